import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vlmrlaif_jax import sharding
from vlmrlaif_jax.convert import from_hf
from vlmrlaif_jax.models import llama
from vlmrlaif_jax.models.vlm import causal_mask, token_positions


def forward(model, tokens, mask):
  x = model.embed_tokens(tokens)
  return model.logits(model(x, token_positions(mask), causal_mask(mask)))


def shapes_of(model):
  tokens = jnp.zeros((1, 4), int)
  init = lambda: model.init(jax.random.key(0), tokens, tokens == 0, method=forward)
  return jax.eval_shape(init)


@pytest.mark.parametrize("variant", llama.VARIANTS)
def test_every_parameter_has_a_sharding_rule(variant):
  shapes = shapes_of(llama.Model(**llama.VARIANTS[variant], rank=8))
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  sharding.shard_by_rules(shapes, llama.SHARDING, mesh)


@pytest.mark.parametrize("variant", llama.VARIANTS)
def test_every_parameter_has_a_name_in_hugging_face(variant):
  shapes = shapes_of(llama.Model(**llama.VARIANTS[variant]))
  assert set(flax.traverse_util.flatten_dict(shapes["params"], sep="/")) == set(
    llama.HF
  )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_transformers(kv_heads, side):
  shape = {**llama.VARIANTS["tiny"], "kv_heads": kv_heads}
  torch.manual_seed(0)
  hf = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=shape["vocab"],
      hidden_size=shape["embed"],
      intermediate_size=shape["mlp"],
      num_hidden_layers=shape["layers"],
      num_attention_heads=shape["heads"],
      num_key_value_heads=kv_heads,
      rms_norm_eps=1e-5,
      initializer_range=0.15,
    )
  ).eval()
  tokens = np.random.default_rng(0).integers(0, shape["vocab"], (2, 9))
  mask = np.ones((2, 9), bool)
  mask[1, slice(0, 3) if side == "left" else slice(6, 9)] = False
  with torch.no_grad():
    positions = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    want = hf(
      torch.tensor(tokens),
      attention_mask=torch.tensor(mask).long(),
      position_ids=positions,
    ).logits.numpy()

  model = llama.Model(**shape)
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  params = from_hf(llama.HF, tensors, shapes_of(model)["params"])
  apply = jax.jit(functools.partial(model.apply, method=forward))
  got = apply({"params": params}, jnp.asarray(tokens), jnp.asarray(mask))
  assert np.std(want) > 0.3  # Or any tolerance would do.
  np.testing.assert_allclose(got[mask], want[mask], atol=2e-5)
