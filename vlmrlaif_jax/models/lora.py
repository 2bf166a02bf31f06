"""Merges LoRA updates into kernels."""

import flax
import jax
import jax.numpy as jnp

from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.models.ops import quantization

_flatten = lambda tree: flax.traverse_util.flatten_dict(tree, sep="/")
_unflatten = lambda flat: flax.traverse_util.unflatten_dict(flat, sep="/")


def merge_lora(variables: Params, alpha: float) -> Params:
  """Returns variables without "lora": each kernel is W + alpha / rank * A B.

  Quantized kernels become float32, because the error of quantizing them again would
  exceed most updates.

  Args:
    variables: the collections "params" and "lora", and "quant" if quantized.
    alpha: LoRA's alpha of the model.
  """
  variables = quantization.restore_quantized(variables)
  params, lora = _flatten(variables["params"]), _flatten(variables["lora"])
  for path, a in lora.items():
    if not path.endswith("/a"):
      continue
    module = path.removesuffix("/a")
    kernel, b = params[f"{module}/kernel"], lora[f"{module}/b"]
    update = jnp.matmul(a, b, precision="highest") * (alpha / a.shape[-1])
    params[f"{module}/kernel"] = (kernel + update).astype(kernel.dtype)
  rest = {name: tree for name, tree in variables.items() if name != "lora"}
  return {**rest, "params": _unflatten(params)}


def count_params(tree: Params) -> int:
  """Returns the number of elements of all arrays of a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
