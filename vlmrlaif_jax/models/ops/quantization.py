"""Frozen kernels in 4 or 8 bits, the base of QLoRA (Dettmers et al. 2023, 2305.14314).

A quantised kernel is a few arrays in the collection "quant", at its module's path:

  NF4   codes         uint8     [inputs / 2, outputs]   two inputs of a block a byte
        block_scale   bfloat16  [inputs / 64, outputs]  of 64 neighbouring inputs
  int8  codes         int8      [inputs, outputs]
        channel_scale float32   [outputs]

A block's first 32 inputs are in the low bits of its 32 bytes, the others in the high
ones: TPUs unpack that row by row, where neighbours in a byte would be shuffled.

Axes before these, such as that of stacked layers, are kept. Double quantisation has
the block scales in int8, 256 neighbouring outputs sharing a scale_step, all of a
layer a scale_mean. NumPy arrays are quantised to NumPy arrays, JAX's to JAX's.
"""

import functools
import math
import re
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vlmrlaif_jax.core.types import AnyArray, Params, merge_params

# 4-bit NormalFloat, 2305.14314 appendix E: quantiles of N(0, 1) in [-1, 1], and 0.
NF4 = np.array(
  [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
  ],
  np.float32,
)
NF4_BLOCK = 64  # Inputs that share a scale.
SCALE_BLOCK = (
  256  # Outputs whose block scales share a step; fewer if it does not divide.
)


def quantize_nf4(
  kernel: Float[AnyArray, "*layers inputs outputs"], *, double: bool = False
) -> Params:
  """A kernel in NF4: the nearest of 16 values, times the largest of its block.

  Args:
    kernel: `inputs` is a multiple of 64. To be sharded along inputs, it is a multiple
      of 64 x the shards.
    double: also quantise the scales: 0.516 bytes a weight instead of 0.531.

  Raises:
    ValueError: blocks do not divide `inputs`.
  """
  xp = kernel.__array_namespace__()
  *layers, inputs, outputs = kernel.shape
  if inputs % NF4_BLOCK:
    raise ValueError(
      f"NF4 needs kernels whose inputs are a multiple of {NF4_BLOCK}, not one of shape "
      f"{kernel.shape}: leave it as it is, or quantise to int8"
    )
  blocks = kernel.astype("float32").reshape(*layers, -1, NF4_BLOCK, outputs)
  largest = xp.max(xp.abs(blocks), axis=-2)
  # Of weights that are in bfloat16, as they are loaded, this loses nothing.
  scale = {"block_scale": largest.astype(jnp.bfloat16)}
  if double:
    scale = _double(largest)
  # The codes make up for what the scales have lost.
  stored = _block_scale(scale)[..., None, :]
  unit = blocks / xp.where(stored == 0, 1, stored)
  codes = sum((unit > edge).astype("uint8") for edge in (NF4[1:] + NF4[:-1]) / 2)
  low, high = codes[..., : NF4_BLOCK // 2, :], codes[..., NF4_BLOCK // 2 :, :]
  packed = (low | high << 4).reshape(*layers, inputs // 2, outputs)
  return {"codes": packed, **scale}


def quantize_int8(kernel: Float[AnyArray, "*layers inputs outputs"]) -> Params:
  """A kernel in int8: each output's weights over 1/127 of the largest, rounded."""
  xp = kernel.__array_namespace__()
  kernel = kernel.astype("float32")
  scale = xp.max(xp.abs(kernel), axis=-2) / 127
  codes = xp.round(kernel / xp.where(scale == 0, 1, scale)[..., None, :])
  return {"codes": codes.astype("int8"), "channel_scale": scale}


SCHEMES: dict[str, Callable[[AnyArray], dict[str, AnyArray]]] = {
  "nf4": quantize_nf4,
  "nf4_double": functools.partial(quantize_nf4, double=True),
  "int8": quantize_int8,
}


def _double(scale: Float[AnyArray, "*layers blocks outputs"]) -> Params:
  """Block scales in int8, around their mean (2305.14314, section 3; FP8 there)."""
  xp, width = scale.__array_namespace__(), math.gcd(SCALE_BLOCK, scale.shape[-1])
  mean = xp.mean(scale, axis=(-2, -1))
  centred = (scale - mean[..., None, None]).reshape(*scale.shape[:-1], -1, width)
  step = xp.max(xp.abs(centred), axis=-1) / 127
  codes = xp.round(centred / xp.where(step == 0, 1, step)[..., None])
  codes = codes.astype("int8").reshape(scale.shape)
  return {"block_scale": codes, "scale_step": step, "scale_mean": mean}


def _block_scale(leaves: Params) -> Float[AnyArray, "*layers blocks outputs"]:
  """The float32 scales of NF4's blocks."""
  scale = leaves["block_scale"].astype("float32")
  if "scale_step" not in leaves:
    return scale
  xp, step = scale.__array_namespace__(), leaves["scale_step"]
  step = xp.repeat(step, scale.shape[-1] // step.shape[-1], axis=-1)
  return scale * step + leaves["scale_mean"][..., None, None]


def _look_up(
  codes: UInt8[AnyArray, "*shape"], table: Float[AnyArray, " values"]
) -> Float[AnyArray, "..."]:
  """table[codes] by selects alone, bit by bit: TPUs gather slowly."""
  half = len(table) // 2
  if not half:
    return table
  high, low = _look_up(codes, table[half:]), _look_up(codes, table[:half])
  return codes.__array_namespace__().where((codes & half) > 0, high, low)


def dequantize(
  leaves: Params, levels: Float[AnyArray, "16"] = NF4
) -> Float[AnyArray, "*layers inputs outputs"]:
  """The float32 kernel that nf4 or int8 has rounded to these arrays.

  Args:
    leaves: of one kernel.
    levels: what NF4's codes stand for.
  """
  codes = leaves["codes"]
  if codes.dtype == "int8":
    return codes.astype("float32") * leaves["channel_scale"][..., None, :]
  xp = codes.__array_namespace__()
  *layers, pairs, outputs = codes.shape
  codes = codes.reshape(*layers, -1, NF4_BLOCK // 2, outputs)
  codes = xp.concat([codes & 15, codes >> 4], axis=-2)
  codes = codes.reshape(*layers, 2 * pairs, outputs)
  return _look_up(codes, levels) * xp.repeat(_block_scale(leaves), NF4_BLOCK, axis=-2)


# Without jax.checkpoint, the dequantised kernel would be kept for the backward pass.
@jax.checkpoint
def quantized_matmul(
  x: Float[Array, "*batch inputs"], leaves: Params
) -> Float[Array, "*batch outputs"]:
  """x @ dequantise(leaves), computed in the dtype of x; a gradient only for x."""
  leaves = jax.lax.stop_gradient(leaves)
  # What depends on frozen weights alone is moved ahead of a loop by compilers, and by
  # the gradient of a scan: there it would be computed once, and stay, as large as what
  # was quantised. So let it depend on x.
  x, leaves, levels = jax.lax.optimization_barrier((x, leaves, NF4))
  if leaves["codes"].dtype == "int8":  # Scaled outputs cost less than scaled weights.
    y = x @ leaves["codes"].astype(x.dtype)
    return (y * leaves["channel_scale"]).astype(x.dtype)
  return x @ dequantize(leaves, levels).astype(x.dtype)


def quantize_params(params: Params, paths: str, *, scheme: str) -> Params:
  """Variables with some kernels moved from "params" to "quant", the rest as it is.

  Args:
    params: the collection "params".
    paths: regular expression of the paths of kernels, such as llama.QUANTISED.
    scheme: a key of SCHEMES.

  Raises:
    ValueError: an unknown scheme, or paths that match nothing.
  """
  if scheme not in SCHEMES:
    raise ValueError(f"scheme must be one of {sorted(SCHEMES)}, not {scheme!r}")
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  quant: dict[str, AnyArray] = {}
  for path in [path for path in flat if re.search(paths, path)]:
    module = path.removesuffix("/kernel")
    leaves = SCHEMES[scheme](flat.pop(path))
    quant |= {f"{module}/{name}": leaf for name, leaf in leaves.items()}
  if not quant:
    raise ValueError(f"no kernel matches {paths!r}; paths are like {sorted(flat)[:3]}")
  unflatten = functools.partial(flax.traverse_util.unflatten_dict, sep="/")
  return {"params": unflatten(flat), "quant": unflatten(quant)}


def restore_quantized(variables: Params) -> Params:
  """The variables without "quant": its kernels dequantised, in "params" again."""
  kernels = jax.tree.map(
    lambda leaves: {"kernel": dequantize(leaves)},
    variables.get("quant", {}),
    is_leaf=lambda tree: "codes" in tree,
  )
  rest = {name: tree for name, tree in variables.items() if name != "quant"}
  return {**rest, "params": merge_params(rest["params"], kernels)}
