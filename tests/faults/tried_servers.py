"""Faults of judge servers and of numbers, with a test of their own."""

from tests.faults.catalog import Tried

SERVERS_AND_NUMBERS: tuple[Tried, ...] = ()
