"""Installs vlmrlaif_jax: pip install -e ".[test]"."""

from setuptools import find_packages, setup

# What compiles for accelerators that are not there; of Linux on x86 alone.
HERE = 'platform_machine == "x86_64" and sys_platform == "linux"'
# libtpu goes with its jax, of which Python 3.11 has none above 0.10.
PLAN = [
  f'libtpu==0.0.42.*; {HERE} and python_version < "3.12"',
  f'libtpu==0.0.50.*; {HERE} and python_version >= "3.12"',
]
PLAN_GPU = [
  f'jax-cuda12-plugin==0.10.2; {HERE} and python_version < "3.12"',
  f'jax-cuda12-pjrt==0.10.2; {HERE} and python_version < "3.12"',
]

setup(
  name="vlmrlaif_jax",
  version="0.1.0",
  description="Aligning video-language models with AI feedback, in JAX.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["vlmrlaif_jax", "vlmrlaif_jax.*"]),
  package_data={"vlmrlaif_jax": ["report.html.j2", "assets/**/*"]},
  install_requires=[
    "absl-py",
    "array_record",
    "av>=14",
    'decord; platform_machine == "x86_64" and sys_platform == "linux"',
    "chex",
    "flax>=0.12.8",
    "grain",
    "httpx",
    "importlib_resources",  # tensorflow-datasets imports it, but does not name it.
    "jax>=0.10.2,<0.13",
    "jaxtyping",
    "jinja2",
    "ml_collections",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "pillow",
    "rich",
    "safetensors",
    "sentencepiece",
    "tensorboardX",
    "tensorflow-datasets",
    "tokenizers",
    "transformers>=5",
  ],
  extras_require={
    "test": [
      "beartype",
      "pytest",
      "pytest-httpserver",
      "rlax",
      "ruff",
      "scipy",
      "torch==2.13.0",
      "transformers[serving]",
    ],
    "bench": ["peft"],
    "plan": PLAN,
    "plan-gpu": PLAN_GPU,
    "gpu": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
  },
)
