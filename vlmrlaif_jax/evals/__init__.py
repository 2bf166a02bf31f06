"""Measures, confidence intervals and the ground truth of the embedded world."""
