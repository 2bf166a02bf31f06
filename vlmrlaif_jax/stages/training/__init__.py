"""Stages that train."""
