"""Benchmarks of papers, one file each."""
