"""The HTML report of a workdir; it needs no JAX."""
