"""Stages that measure policies and judges."""
