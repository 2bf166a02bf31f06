"""Export, model cards and chat for trained weights."""
