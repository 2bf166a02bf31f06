"""The training loop, the update, checkpoints and alarms, for any method."""
