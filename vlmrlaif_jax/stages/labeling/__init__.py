"""Stages that label responses of a policy with preferences."""
