"""Qwen2 and Qwen2.5 (Yang et al. 2024, 2412.15115): Llama with biases on q, k and v."""

import functools

from jax.sharding import PartitionSpec as P

from vlmrlaif_jax.models import decoder
from vlmrlaif_jax.models.decoders import llama

_shape = lambda embed, mlp, layers, heads, kv_heads, vocab=152_064, tied=False: dict(
  vocab=vocab,
  embed=embed,
  mlp=mlp,
  layers=layers,
  heads=heads,
  kv_heads=kv_heads,
  tied=tied,
)
_small = functools.partial(_shape, vocab=151_936, tied=True)

# Sizes of Qwen2.5; 0.5b, 1.5b, 7b and 72b are also sizes of Qwen2.
VARIANTS = {
  "tiny": _shape(32, 64, 2, 4, 2, vocab=64),
  "0.5b": _small(896, 4864, 24, 14, 2),
  "1.5b": _small(1536, 8960, 28, 12, 2),
  "3b": _small(2048, 11_008, 36, 16, 2),
  "7b": _shape(3584, 18_944, 28, 28, 4),
  "14b": _shape(5120, 13_824, 48, 40, 8),
  "32b": _shape(5120, 27_648, 64, 40, 8),
  "72b": _shape(8192, 29_568, 80, 64, 8),
}

# See llama.CONFIG; head_dim follows from embed and heads.
CONFIG = {field: name for field, name in llama.CONFIG.items() if field != "head_dim"}

SHARDING = ((r"blocks/(q|k|v)/bias", P(None, "tensor")), *llama.SHARDING)

HF = {
  **llama.HF,
  **{
    f"blocks/{x}/bias": (f"model.layers.{{}}.self_attn.{x}_proj.bias", "")
    for x in ("q", "k", "v")
  },
}

Model = functools.partial(decoder.Decoder, qkv_bias=True, rope_base=1e6, eps=1e-6)
