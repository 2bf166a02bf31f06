"""Four virtual CPU devices for every test, so that sharding can be tested."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
