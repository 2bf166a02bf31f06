"""Installs vlmrlaif_jax: pip install -e ".[test]"."""

import ast
import pathlib

from setuptools import find_packages, setup

INIT = pathlib.Path(__file__).parent / "vlmrlaif_jax" / "__init__.py"
# Parsed rather than imported: a build environment has no JAX.
(VERSION,) = [
  ast.literal_eval(node.value)
  for node in ast.parse(INIT.read_text()).body
  if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
]

# Compilers for accelerators that this machine does not have. They exist for Linux on
# x86 only: libtpu, and JAX's CUDA plugin with NVIDIA's assembler. cuDNN compiles
# attention for GPUs.
HERE = 'platform_machine == "x86_64" and sys_platform == "linux"'
PLAN = [f"jax[tpu]; {HERE}"]
PLAN_GPU = [f"jax[cuda12-local]; {HERE}", f"nvidia-cuda-nvcc-cu12; {HERE}"]
DOCS = ["latex2mathml", "mkdocs-material", "mkdocstrings[python]"]
CUDNN = f"nvidia-cudnn-cu12<10; {HERE}"
# Older servers read files for others, or stall: CVE-2026-28414 of Gradio,
# CVE-2026-40347 of python-multipart, CVE-2025-62727 of Starlette.
CHAT = ["gradio>=6.7", "python-multipart>=0.0.26", "starlette>=0.49.1"]


setup(
  name="vlmrlaif_jax",
  version=VERSION,
  description="Aligning video-language models with AI feedback, in JAX.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["vlmrlaif_jax", "vlmrlaif_jax.*"]),
  package_data={"vlmrlaif_jax": ["assets/**/*", "py.typed"]},
  install_requires=[
    "absl-py",
    "array_record",
    "av>=18",  # Its wheels contain FFmpeg 8.1.2, which fixes CVE-2026-8461.
    "chex",
    "flax>=0.12.8",
    "grain",
    "httpx>=0.28",
    "huggingface_hub",
    "importlib_resources",  # tensorflow-datasets imports it, but does not name it.
    "jax>=0.10.2,<0.13",
    "jaxtyping",
    "jinja2>=3.1.6",  # Templates of checkpoints leave older sandboxes, CVE-2025-27516.
    "ml_collections",
    "numpy",
    "openai>=1.109",
    "optax",
    "orbax-checkpoint",
    "pillow>=12.3",  # Older ones write out of bounds, CVE-2026-59199. 13 is safer.
    "pyarrow>=14.0.1",  # Older ones run code of Parquet files, CVE-2023-47248.
    "rich",
    "safetensors",
    "sentencepiece>=0.2.1",  # Models of others corrupt older ones, CVE-2026-1260.
    "tensorboardX",
    "tensorflow-datasets",
    "tokenizers",
    "transformers>=5",
  ],
  entry_points={
    "lmms_eval.models": ["vlmrlaif_jax = vlmrlaif_jax.serving.lmms_plugin:MODEL"],
  },
  extras_require={
    "test": [
      *CHAT,
      *DOCS,
      "beartype",
      f"decord; {HERE}",
      "httpx",
      "matplotlib",
      "mypy",
      "num2words",
      "peft",
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
    "test-compilers": [*PLAN, *PLAN_GPU],
    "bench": ["matplotlib"],
    "chat": CHAT,
    "decord": ["decord"],
    "dev": ["mypy", "pre-commit", "ruff"],
    "docs": DOCS,
    "lmms": ["lmms-eval>=0.7.3"],
    "plan": PLAN,
    "plan-gpu": [*PLAN_GPU, CUDNN],
    "gpu": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
  },
)
