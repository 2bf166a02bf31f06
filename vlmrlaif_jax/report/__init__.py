"""The HTML report of a workdir, without JAX."""
