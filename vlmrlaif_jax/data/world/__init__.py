"""The embedded world: short clips of moving shapes whose truth is known."""
