"""Llama (Touvron et al. 2023, 2302.13971), and Vicuna, which has the same shapes."""

from jax.sharding import PartitionSpec as P

from vlmrlaif_jax.models import decoder

VARIANTS = {
  "tiny": dict(vocab=64, embed=32, mlp=64, layers=2, heads=4, kv_heads=2),
  # Models with random weights, for measurements on a small machine.
  "3m": dict(vocab=2048, embed=256, mlp=704, layers=2, heads=8, kv_heads=8),
  "100m": dict(vocab=32_000, embed=640, mlp=1728, layers=12, heads=10, kv_heads=10),
  "110m": dict(vocab=16_384, embed=768, mlp=2048, layers=12, heads=12, kv_heads=12),
  # Published models.
  "7b": dict(vocab=32_000, embed=4096, mlp=11_008, layers=32, heads=32, kv_heads=32),
  "13b": dict(vocab=32_000, embed=5120, mlp=13_824, layers=40, heads=40, kv_heads=40),
}

# Names of the fields of Model in a Hugging Face config.json.
CONFIG = {
  "vocab": "vocab_size",
  "embed": "hidden_size",
  "mlp": "intermediate_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "rope_base": "rope_parameters.rope_theta",
  "eps": "rms_norm_eps",
  "tied": "tie_word_embeddings",
}

# Shardings of parameters over the mesh: the first pattern that matches applies.
SHARDING = (
  (r"embed/embedding", P(None, ("fsdp", "tensor"))),
  (r"blocks/(q|k|v|gate|up)/(kernel|codes|block_scale)", P(None, "fsdp", "tensor")),
  (r"blocks/(o|down)/(kernel|codes|block_scale)", P(None, "tensor", "fsdp")),
  (r"blocks/\w+/(channel_scale|scale_step|scale_mean)", P()),
  (r"blocks/(q|k|v|gate|up|o|down)/a", P(None, "fsdp", None)),
  (r"blocks/(q|k|v|gate|up|o|down)/b", P(None, None, "tensor")),
  (r"lm_head/kernel", P("fsdp", "tensor")),
  (r"norm/scale", P()),
)

# Kernels that may be quantized, in a language model or in a VLM.
QUANTIZED = r"^(llm/)?blocks/(q|k|v|o|gate|up|down)/kernel$"

# Sources of parameters in a Hugging Face checkpoint: the tensor's name, with {} for the
# layer, and "T" if the matrix is transposed. A tied model has no lm_head.
HF = {
  "embed/embedding": ("model.embed_tokens.weight", ""),
  "blocks/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", ""),
  "blocks/q/kernel": ("model.layers.{}.self_attn.q_proj.weight", "T"),
  "blocks/k/kernel": ("model.layers.{}.self_attn.k_proj.weight", "T"),
  "blocks/v/kernel": ("model.layers.{}.self_attn.v_proj.weight", "T"),
  "blocks/o/kernel": ("model.layers.{}.self_attn.o_proj.weight", "T"),
  "blocks/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", ""),
  "blocks/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight", "T"),
  "blocks/up/kernel": ("model.layers.{}.mlp.up_proj.weight", "T"),
  "blocks/down/kernel": ("model.layers.{}.mlp.down_proj.weight", "T"),
  "norm/scale": ("model.norm.weight", ""),
  "lm_head/kernel": ("lm_head.weight", "T"),
}

Model = decoder.Decoder
