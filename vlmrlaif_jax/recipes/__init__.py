"""Recipes: validation of settings, and a runner that resumes stages."""
