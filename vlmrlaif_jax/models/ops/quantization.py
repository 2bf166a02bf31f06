"""Quantizes frozen kernels to 4 or 8 bits: QLoRA (Dettmers et al. 2023, 2305.14314).

A quantized kernel is a few arrays in the collection "quant", at its module's path:

  NF4   codes         uint8     [inputs / 2, outputs]   two inputs of a block per byte
        block_scale   bfloat16  [inputs / 64, outputs]  scales of 64 neighboring inputs
  int8  codes         int8      [inputs, outputs]
        channel_scale float32   [outputs]

The low bits of a block's 32 bytes contain its first 32 inputs, the high bits the other
32. TPUs unpack this layout row by row; with neighbors in a byte, they would shuffle.

Leading axes, such as stacked layers, do not change. Double quantization stores block
scales in int8: 256 neighboring outputs share a scale_step, and a layer shares a
scale_mean. NumPy arrays give NumPy arrays, and JAX arrays give JAX arrays.
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

# 4-bit NormalFloat (2305.14314, appendix E): quantiles of N(0, 1) in [-1, 1], and 0.
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
# Outputs whose block scales share a step; reduced to a divisor of the outputs.
SCALE_BLOCK = 256


def quantize_nf4(
  kernel: Float[AnyArray, "*layers inputs outputs"], *, double: bool = False
) -> Params:
  """Quantizes a kernel to NF4: the nearest of 16 values times the block's maximum.

  Args:
    kernel: a kernel whose inputs are a multiple of 64, or of 64 x the shards if it is
      sharded along inputs.
    double: whether scales are quantized too: 0.516 bytes per weight instead of 0.531.

  Raises:
    ValueError: `inputs` is no multiple of 64.
  """
  xp = kernel.__array_namespace__()
  *layers, inputs, outputs = kernel.shape
  if inputs % NF4_BLOCK:
    raise ValueError(
      f"NF4 needs kernels whose inputs are a multiple of {NF4_BLOCK}, not one of shape "
      f'{kernel.shape}: set --config.model.quant to "none" or "int8"'
    )
  blocks = kernel.astype("float32").reshape(*layers, -1, NF4_BLOCK, outputs)
  largest = xp.max(xp.abs(blocks), axis=-2)
  # Exact for weights that are loaded in bfloat16.
  scale = {"block_scale": largest.astype(jnp.bfloat16)}
  if double:
    scale = _quantize_scales(largest)
  # Codes are relative to the rounded scales, which reduces the error.
  stored = _get_block_scale(scale)[..., None, :]
  unit = blocks / xp.where(stored == 0, 1, stored)
  codes = sum((unit > edge).astype("uint8") for edge in (NF4[1:] + NF4[:-1]) / 2)
  low, high = codes[..., : NF4_BLOCK // 2, :], codes[..., NF4_BLOCK // 2 :, :]
  packed = (low | high << 4).reshape(*layers, inputs // 2, outputs)
  return {"codes": packed, **scale}


def quantize_int8(kernel: Float[AnyArray, "*layers inputs outputs"]) -> Params:
  """Quantizes a kernel to int8, in units of 1/127 of each output's maximum."""
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


def _quantize_scales(scale: Float[AnyArray, "*layers blocks outputs"]) -> Params:
  """Quantizes block scales to int8 around their mean; FP8 in 2305.14314, section 3."""
  xp, width = scale.__array_namespace__(), math.gcd(SCALE_BLOCK, scale.shape[-1])
  mean = xp.mean(scale, axis=(-2, -1))
  centered = (scale - mean[..., None, None]).reshape(*scale.shape[:-1], -1, width)
  step = xp.max(xp.abs(centered), axis=-1) / 127
  codes = xp.round(centered / xp.where(step == 0, 1, step)[..., None])
  codes = codes.astype("int8").reshape(scale.shape)
  return {"block_scale": codes, "scale_step": step, "scale_mean": mean}


def _get_block_scale(leaves: Params) -> Float[AnyArray, "*layers blocks outputs"]:
  """Returns the float32 scales of NF4 blocks."""
  scale = leaves["block_scale"].astype("float32")
  if "scale_step" not in leaves:
    return scale
  xp, step = scale.__array_namespace__(), leaves["scale_step"]
  step = xp.repeat(step, scale.shape[-1] // step.shape[-1], axis=-1)
  return scale * step + leaves["scale_mean"][..., None, None]


def _look_up(
  codes: UInt8[AnyArray, "*shape"], table: Float[AnyArray, " values"]
) -> Float[AnyArray, "..."]:
  """Returns table[codes] by selects on each bit, because gathers are slow on TPUs."""
  half = len(table) // 2
  if not half:
    return table
  high, low = _look_up(codes, table[half:]), _look_up(codes, table[:half])
  return codes.__array_namespace__().where((codes & half) > 0, high, low)


def dequantize(
  leaves: Params, levels: Float[AnyArray, "16"] = NF4
) -> Float[AnyArray, "*layers inputs outputs"]:
  """Returns the float32 kernel of NF4 or int8 arrays.

  Args:
    leaves: arrays of one quantized kernel.
    levels: values of NF4's codes.
  """
  codes = leaves["codes"]
  if codes.dtype == "int8":
    return codes.astype("float32") * leaves["channel_scale"][..., None, :]
  xp = codes.__array_namespace__()
  *layers, pairs, outputs = codes.shape
  codes = codes.reshape(*layers, -1, NF4_BLOCK // 2, outputs)
  codes = xp.concat([codes & 15, codes >> 4], axis=-2)
  codes = codes.reshape(*layers, 2 * pairs, outputs)
  return _look_up(codes, levels) * xp.repeat(
    _get_block_scale(leaves), NF4_BLOCK, axis=-2
  )


# Without jax.checkpoint, the dequantized kernel would be stored for the backward pass.
@jax.checkpoint
def quantized_matmul(
  x: Float[Array, "*batch inputs"], leaves: Params
) -> Float[Array, "*batch outputs"]:
  """Computes x @ dequantize(leaves) in the dtype of x, with a gradient only for x."""
  leaves = jax.lax.stop_gradient(leaves)
  # XLA, and the gradient of a scan, move computations on frozen weights out of loops.
  # Then all dequantized kernels would be in memory, so they are made to depend on x.
  x, leaves, levels = jax.lax.optimization_barrier((x, leaves, NF4))
  if leaves["codes"].dtype == "int8":  # Scaling outputs costs less than weights.
    y = x @ leaves["codes"].astype(x.dtype)
    return (y * leaves["channel_scale"]).astype(x.dtype)
  return x @ dequantize(leaves, levels).astype(x.dtype)


def quantize_params(params: Params, paths: str, *, scheme: str) -> Params:
  """Returns variables with some kernels quantized and moved from "params" to "quant".

  Args:
    params: the collection "params".
    paths: regular expression of the paths of kernels, such as llama.QUANTIZED.
    scheme: a key of SCHEMES.

  Raises:
    ValueError: `scheme` is unknown, or `paths` matches no kernel.
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
  """Returns variables whose quantized kernels are dequantized and back in "params"."""
  kernels = jax.tree.map(
    lambda leaves: {"kernel": dequantize(leaves)},
    variables.get("quant", {}),
    is_leaf=lambda tree: "codes" in tree,
  )
  rest = {name: tree for name, tree in variables.items() if name != "quant"}
  return {**rest, "params": merge_params(rest["params"], kernels)}
