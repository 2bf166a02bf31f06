"""Mistral (Jiang et al. 2023, 2310.06825): Llama, with a window in some versions."""

from vlmrlaif_jax.models import decoder
from vlmrlaif_jax.models.decoders import llama

_seven = dict(embed=4096, mlp=14_336, layers=32, heads=32, kv_heads=8)

VARIANTS = {
  "tiny": llama.VARIANTS["tiny"],
  "7b": dict(vocab=32_000, **_seven),  # Versions 0.1 and 0.2.
  "7b_v3": dict(vocab=32_768, **_seven),  # Version 0.3.
}

CONFIG = llama.CONFIG

SHARDING = llama.SHARDING

HF = llama.HF

Model = decoder.Decoder
