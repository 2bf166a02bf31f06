"""The embedded world: short clips of moving shapes with exact ground truth."""
