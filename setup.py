"""Installs vlmrlaif_jax: pip install -e ".[test]"."""

from setuptools import find_packages, setup

# What compiles for accelerators that are not there, on Linux and x86: the libtpu that
# jax goes with; its CUDA plugin and NVIDIA's assembler, and cuDNN for its attention.
HERE = 'platform_machine == "x86_64" and sys_platform == "linux"'
PLAN = [f"jax[tpu]; {HERE}"]
PLAN_GPU = [f"jax[cuda12-local]; {HERE}", f"nvidia-cuda-nvcc-cu12; {HERE}"]
DOCS = ["latex2mathml", "mkdocs-material"]
CUDNN = f"nvidia-cudnn-cu12<10; {HERE}"


setup(
  name="vlmrlaif_jax",
  version="0.1.0",
  description="Aligning video-language models with AI feedback, in JAX.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["vlmrlaif_jax", "vlmrlaif_jax.*"]),
  package_data={"vlmrlaif_jax": ["assets/**/*"]},
  install_requires=[
    "absl-py",
    "array_record",
    "av>=14",
    'decord; platform_machine == "x86_64" and sys_platform == "linux"',
    "chex",
    "flax>=0.12.8",
    "grain",
    "httpx",
    "huggingface_hub",
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
      *PLAN,
      *PLAN_GPU,
      *DOCS,
      "beartype",
      "gradio",
      "matplotlib",
      "playwright",
      "pytest",
      "pytest-httpserver",
      "pytest-xdist",
      "pyyaml",
      "rlax",
      "ruff",
      "scipy",
      "torch==2.13.0",
      "transformers[serving]",
    ],
    "bench": ["matplotlib"],
    "chat": ["gradio"],
    "docs": DOCS,
    "plan": PLAN,
    "plan-gpu": [*PLAN_GPU, CUDNN],
    "gpu": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
  },
)
