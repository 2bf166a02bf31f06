"""CLIP's text tower alone, against transformers."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vlmrlaif_jax.huggingface.convert import convert_from_hf
from vlmrlaif_jax.models import clip_text

SHAPE = dict(vocab=64, context=16, embed=32, mlp=64, layers=2, heads=4)
TOKENS = np.array([[1, 5, 9, 63, 63, 63], [1, 7, 7, 2, 8, 63]])  # 63 ends a caption.
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)


def their_config(activation):
  return transformers.CLIPTextConfig(
    vocab_size=SHAPE["vocab"],
    max_position_embeddings=SHAPE["context"],
    hidden_size=SHAPE["embed"],
    intermediate_size=SHAPE["mlp"],
    num_hidden_layers=SHAPE["layers"],
    num_attention_heads=SHAPE["heads"],
    hidden_act=activation,
    projection_dim=24,
    bos_token_id=1,
    eos_token_id=63,
  )


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_vectors_are_those_of_transformers_at_unit_length(activation):
  torch.manual_seed(0)
  hf = transformers.CLIPTextModelWithProjection(their_config(activation)).eval()
  with torch.no_grad():
    for p in hf.parameters():
      p.add_(0.2 * torch.randn_like(p))
    given = torch.tensor(TOKENS), torch.tensor(MASK.astype(int))
    want = torch.nn.functional.normalize(hf(*given).text_embeds).numpy()
  model = clip_text.TextEncoder(clip_text.TextTower(**SHAPE, activation=activation), 24)
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, MASK)["params"]
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  params = convert_from_hf(clip_text.HF_TEXT, tensors, shapes)
  got = jax.jit(model.apply)({"params": params}, TOKENS, MASK)
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_every_parameter_has_a_name():
  model = clip_text.TextEncoder(clip_text.TextTower(**SHAPE), 24)
  tokens = jnp.zeros((1, 4), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens == 0)
  assert set(flax.traverse_util.flatten_dict(shapes["params"], sep="/")) == set(
    clip_text.HF_TEXT
  )
