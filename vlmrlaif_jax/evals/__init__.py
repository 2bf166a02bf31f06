"""Benchmarks, measures and confidence intervals, and scores by exact truth."""
