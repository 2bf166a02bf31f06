"""Feedback on responses: judges, rankers, claims and reward models."""
