"""Measures the error of logits of quantized bases: python perf/quant_error.py.

It prints a row for each family, for language models of the widths in SIZES with four
layers, a small vocabulary and random weights. The error is the norm of the difference
to the logits in float32, divided by the norm of those.
"""

import functools
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch, Params
from vlmrlaif_jax.huggingface import convert, families
from vlmrlaif_jax.huggingface.config_keys import HfConfig
from vlmrlaif_jax.models import clip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.ops import quantization
from vlmrlaif_jax.models.projector import Projector

SCHEMES = ("nf4", "int8")
# Sizes of the language models, each by its family.
SIZES = {
  "smolvlm": "256m",
  "llava": "100m",
  "llava_onevision": "0.5b",
  "qwen3_vl": "2b",
  "qwen2_5_vl": "3b",
}
FRAMES = 8  # Placeholders and features of the video of a row.


def make_config(family: str, **fields: Any) -> HfConfig:
  """Returns the config of a model with a tiny vision tower.

  Args:
    family: a model_type of checkpoints.
    fields: fields of Decoder.
  """
  if family == "llava":
    llm = llama.Model(**fields)
    tower = clip.VisionTower(**clip.VARIANTS["tiny"])
    model = vlm.VLM(tower, Projector(llm.embed), llm)
    config = convert.make_llava_config(model, image_token=llm.vocab - 1)
    return {**config, "projector_depth": 2}
  models = families.FAMILIES[family].models
  tower = models.Model(**{**models.VARIANTS["tiny"], "out": fields["embed"]})
  return families.make_family_config(family, models.DECODER.Model(**fields), tower)


def make_published_fields(family: str) -> dict[str, Any]:
  """Returns the fields of the language model that is measured."""
  is_llava = family == "llava"
  sizes = llama.VARIANTS if is_llava else families.FAMILIES[family].models.LLM_VARIANTS
  return {**sizes[SIZES[family]], "layers": 4, "vocab": 1024}


def make_random_params(model: vlm.VLM) -> Params:
  """Returns random parameters.

  Kernels have the standard deviation 1 / sqrt(inputs), and norms are 1. Embeddings have
  0.02, so the layers contribute most of the states.
  """
  rng = np.random.default_rng(0)

  def make(path, leaf):
    name = path[-1].key
    if name == "scale":
      return np.ones(leaf.shape, np.float32)
    std = leaf.shape[-2] ** -0.5 if name == "kernel" else 0.02
    return std * rng.standard_normal(leaf.shape, np.float32)

  return jax.tree_util.tree_map_with_path(make, vlm.get_param_shapes(model))


def make_rows(model: vlm.VLM, rows: int = 2, time: int = 32) -> Batch:
  """Returns rows of a video and text, of which the second half is a response."""
  rng, shape = np.random.default_rng(1), (rows, time)
  tokens = rng.integers(1, model.llm.vocab, shape)
  tokens[:, 1 : 1 + FRAMES] = VIDEO_TOKEN
  features = rng.standard_normal((rows, FRAMES, *model.vision.feature_shape), "f4")
  mask, answer = np.ones(shape, bool), np.arange(time) >= time // 2
  axes = 3 if model.llm.mrope else 1
  positions = np.tile(np.arange(time)[:, None], (rows, 1, axes))
  return jax.tree.map(
    jnp.asarray, Batch(features, tokens, mask, mask & answer, positions)
  )


def compute_error(got: jax.Array, want: jax.Array) -> float:
  """Returns the relative error of logits, by the Euclidean norm."""
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def measure_errors(family: str) -> list[float]:
  """Returns the errors of a family with each of SCHEMES."""
  config = make_config(family, **make_published_fields(family))
  model = convert.make_model(config, "float32")
  params = jax.device_put(make_random_params(model))
  apply, rows = jax.jit(model.apply), make_rows(model)
  want, errors = apply({"params": params}, rows), []
  for scheme in SCHEMES:
    quantize = functools.partial(quantization.quantize_params, scheme=scheme)
    variables = jax.jit(lambda x, f=quantize: f(x, llama.QUANTIZED))(params)
    errors.append(compute_error(apply(variables, rows), want))
  return errors


def main(argv: list[str]) -> None:
  """Prints a table."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  print(markdown_table([], ["family", "width x MLP", *SCHEMES]))
  for family in SIZES:
    fields = make_published_fields(family)
    errors = [f"{error:.2%}" for error in measure_errors(family)]
    row = [f"`{family}`", f"{fields['embed']} x {fields['mlp']}", *errors]
    print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
  app.run(main)
