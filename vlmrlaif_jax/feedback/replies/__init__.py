"""Parses replies of judges and policies; None if a reply decides nothing."""
