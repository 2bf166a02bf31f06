"""Benchmarks of papers and of the run's held-out data, one module each."""
