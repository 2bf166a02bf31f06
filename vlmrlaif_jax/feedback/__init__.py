"""Judges, rankers, claims and generative reward models: from texts to scores."""
