"""Recipes: validation of settings, and stages run in order and resumed."""
