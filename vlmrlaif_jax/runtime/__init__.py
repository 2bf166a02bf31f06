"""A run's models, weights, data and features, and inference with them."""
