"""Stages of recipes: training, labeling and evaluation."""
