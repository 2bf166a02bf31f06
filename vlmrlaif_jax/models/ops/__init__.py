"""Attention, quantization and kernels that the models share."""
