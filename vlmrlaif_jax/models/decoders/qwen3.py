"""Dense Qwen3 models (Yang et al. 2025, 2505.09388): Llama with RMSNorm of q and k."""

import functools

from vlmrlaif_jax.models import decoder
from vlmrlaif_jax.models.decoders import llama

_shape = lambda embed, mlp, layers, heads, kv_heads=8, tied=False: dict(
  vocab=151_936,
  embed=embed,
  mlp=mlp,
  layers=layers,
  heads=heads,
  kv_heads=kv_heads,
  head_dim=128,
  tied=tied,
)

VARIANTS = {
  "tiny": {**_shape(32, 64, 2, 4, 2, tied=True), "vocab": 64, "head_dim": 16},
  "0.6b": _shape(1024, 3072, 28, 16, tied=True),
  "1.7b": _shape(2048, 6144, 28, 16, tied=True),
  "4b": _shape(2560, 9728, 36, 32, tied=True),
  "8b": _shape(4096, 12_288, 36, 32),
  "14b": _shape(5120, 17_408, 40, 40),
  "32b": _shape(5120, 25_600, 64, 64),
}

CONFIG = llama.CONFIG

SHARDING = llama.SHARDING  # Its rule "norm/scale" also matches these norms.

HF = {
  **llama.HF,
  **{
    f"blocks/{x}_norm/scale": (f"model.layers.{{}}.self_attn.{x}_norm.weight", "")
    for x in ("q", "k")
  },
}

Model = functools.partial(decoder.Decoder, qk_norm=True, rope_base=1e6, eps=1e-6)
