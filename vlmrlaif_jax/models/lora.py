"""What is trained and what is not, and LoRA as a tree of its own."""

import re
from collections.abc import Iterable, Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np

from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.models.ops import quantization

_flatten = lambda tree: flax.traverse_util.flatten_dict(tree, sep="/")
_unflatten = lambda flat: flax.traverse_util.unflatten_dict(flat, sep="/")


def split(variables: Params, patterns: Iterable[str]) -> tuple[Params, Params]:
  """The frozen and the trained leaves of variables; types.join is the inverse.

  Args:
    variables: collections, such as {"params": ..., "lora": ...}.
    patterns: regular expressions; a leaf is trained if one of them is found in its
      path, such as "lora/llm/blocks/q/a".

  Raises:
    ValueError: a pattern that matches nothing.
  """
  flat = _flatten(variables)
  trained = {}
  for pattern in patterns:
    found = {path: leaf for path, leaf in flat.items() if re.search(pattern, path)}
    if not found:
      raise ValueError(
        f"no variable matches {pattern!r}; paths are like {sorted(flat)[:3]}"
      )
    trained |= found
  frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
  return _unflatten(frozen), _unflatten(trained)


def merge(variables: Params, alpha: float) -> Params:
  """Variables without "lora": each update folded into its kernel, W + alpha/r A B.

  Quantised kernels are dequantised for it, to float32, and stay so: rounding them
  again would lose more than most updates are.

  Args:
    variables: with the collections "params" and "lora", and "quant" or not.
    alpha: of the model that the variables belong to.
  """
  variables = quantization.restore(variables)
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


def count(tree: Params) -> int:
  """How many numbers the leaves of a tree hold."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _peft_names(table: Mapping[str, tuple[str, str]], prefix: str) -> dict[str, str]:
  """Path of each LoRA factor that a model can have -> its name in PEFT's files."""
  return {
    path.removesuffix("kernel") + ours: prefix
    + name.removesuffix("weight")
    + f"lora_{theirs}.weight"
    for path, (name, op) in table.items()
    if path.endswith("/kernel") and op == "T"
    for ours, theirs in (("a", "A"), ("b", "B"))
  }


def to_peft(
  lora: Params,
  table: Mapping[str, tuple[str, str]],
  *,
  prefix: str = "base_model.model.",
) -> dict[str, np.ndarray]:
  """The tensors of a PEFT adapter file: name -> one layer's factor.

  Args:
    lora: the collection "lora".
    table: the HF table of the model, whose paths begin where lora's do.
    prefix: what PEFT puts before the names of the model's modules.
  """
  names, tensors = _peft_names(table, prefix), {}
  for path, leaf in _flatten(lora).items():
    for i, factor in enumerate(np.asarray(leaf)):
      tensors[names[path].format(i)] = np.ascontiguousarray(factor.T)
  return tensors


def from_peft(
  tensors: Mapping[str, np.ndarray],
  shapes: Params,
  table: Mapping[str, tuple[str, str]],
  *,
  prefix: str = "base_model.model.",
) -> Params:
  """The collection "lora" from the tensors of a PEFT adapter file.

  Args:
    tensors: name -> array.
    shapes: what jax.eval_shape says of the model's "lora".
    table: the HF table of the model, whose paths begin where lora's do.
    prefix: what PEFT puts before the names of the model's modules.

  Raises:
    ValueError: tensors that are missing, that nothing used, or of another rank or
      size than the model's.
  """
  names = _peft_names(table, prefix)
  wanted = {
    path: [names[path].format(i) for i in range(leaf.shape[0])]
    for path, leaf in _flatten(shapes).items()
  }
  used = {name for layers in wanted.values() for name in layers}
  if used != set(tensors):
    raise ValueError(
      f"missing from the adapter: {sorted(used - set(tensors))};"
      f" of no use in it: {sorted(set(tensors) - used)}"
    )
  for path, leaf in _flatten(shapes).items():
    for name in wanted[path]:
      if tensors[name].shape != leaf.shape[:0:-1]:
        raise ValueError(
          f"{name} must have shape {leaf.shape[:0:-1]}; it has {tensors[name].shape}: "
          "the adapter is of another rank or of a model of another size"
        )
  stack = lambda layers: np.stack([np.float32(tensors[name]).T for name in layers])
  return _unflatten({path: stack(layers) for path, layers in wanted.items()})
