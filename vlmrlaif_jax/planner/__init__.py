"""Memory, time and cost of a recipe on devices that this machine does not have."""
