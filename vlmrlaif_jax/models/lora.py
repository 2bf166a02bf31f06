"""Merges LoRA updates into kernels."""

import flax
import jax
import jax.numpy as jnp

from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.models.ops import quantization

UPDATES = ("frozen_lora", "lora")  # Collections of LoRA factors.
_flatten = lambda tree: flax.traverse_util.flatten_dict(tree, sep="/")
_unflatten = lambda flat: flax.traverse_util.unflatten_dict(flat, sep="/")


def merge_lora(variables: Params, alpha: float) -> Params:
  """Returns variables whose kernels include all LoRA updates: W + alpha / rank * A B.

  Quantized kernels become float32, because the error of quantizing them again would
  exceed most updates.

  Args:
    variables: the collection "params", "quant" if quantized, and those of updates:
      "lora" and "frozen_lora".
    alpha: LoRA's alpha of the model.
  """
  variables = quantization.restore_quantized(variables)
  params = _flatten(variables["params"])
  for name in UPDATES:
    factors = _flatten(variables.get(name, {}))
    for path, a in factors.items():
      if not path.endswith("/a"):
        continue
      module = path.removesuffix("/a")
      kernel, b = params[f"{module}/kernel"], factors[f"{module}/b"]
      scale = alpha / a.shape[-1] if name == "lora" else 1.0
      update = jnp.matmul(a, b, precision="highest") * scale
      params[f"{module}/kernel"] = (kernel + update).astype(kernel.dtype)
  rest = {name: tree for name, tree in variables.items() if name not in UPDATES}
  return {**rest, "params": _unflatten(params)}


def join_lora(variables: Params, alpha: float) -> Params:
  """Returns one collection "lora" for the sum of all updates, with alpha equal to rank.

  The rank is the sum of the ranks. The product of two joined factors is the sum of the
  products: [A1 A2] [B1; B2] = A1 B1 + A2 B2.

  Args:
    variables: as in merge_lora.
    alpha: LoRA's alpha of the model.
  """
  joined: Params = {}
  for name in UPDATES:
    for path, x in _flatten(variables.get(name, {})).items():
      is_b = path.endswith("/b")
      if is_b and name == "lora":
        x = x * (alpha / x.shape[-2])
      parts = [joined[path], x] if path in joined else [x]
      joined[path] = jnp.concatenate(parts, axis=-2 if is_b else -1)
  return _unflatten(joined)


def count_params(tree: Params) -> int:
  """Returns the number of elements of all arrays of a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
