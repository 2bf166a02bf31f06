"""LoRA as a tree of its own, merged into kernels."""

import flax
import jax
import jax.numpy as jnp

from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.models.ops import quantization

_flatten = lambda tree: flax.traverse_util.flatten_dict(tree, sep="/")
_unflatten = lambda flat: flax.traverse_util.unflatten_dict(flat, sep="/")


def merge_lora(variables: Params, alpha: float) -> Params:
  """Variables without "lora": each update folded into its kernel, W + alpha/r A B.

  Quantised kernels are dequantised for it, to float32, and stay so: rounding them
  again would lose more than most updates are.

  Args:
    variables: with the collections "params" and "lora", and "quant" or not.
    alpha: of the model that the variables belong to.
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
  """How many numbers the leaves of a tree hold."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
