"""Recipes, one per file, and the sections that they share (front.py)."""
