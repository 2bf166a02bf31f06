"""Positions on three axes, and additions to the first layers, as transformers has them.

Their models get our positions, because Qwen2.5-VL's own are wrong after a video.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen25_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

from vlmrlaif_jax.huggingface.convert import convert_from_hf
from vlmrlaif_jax.models.decoders import qwen2, qwen3
from vlmrlaif_jax.models.layers import assign_frequencies, rope

QWEN3_VL, QWEN25_VL = dict(mrope=(24, 20, 20), mrope_interleaved=True), dict(
  mrope=(16, 24, 24)
)  # fmt: skip


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def positions_of(seed, rows, time):
  """Increasing positions that jump, differently on each axis."""
  steps = np.random.default_rng(seed).integers(0, 9, (rows, time, 3))
  return np.cumsum(steps, axis=1)


def as_theirs(positions):
  return torch.tensor(np.moveaxis(positions, -1, 0))


# The tables.


def their_table(family, base):
  parameters = {"rope_type": "default", "rope_theta": base}
  if family == "qwen3_vl":
    config = qwen3_vl.Qwen3VLTextConfig(
      head_dim=128, rope_parameters={**parameters, "mrope_section": [24, 20, 20]}
    )
    return qwen3_vl.Qwen3VLTextRotaryEmbedding(config)
  config = qwen25_vl.Qwen2_5_VLTextConfig(
    hidden_size=512,
    num_attention_heads=4,
    rope_parameters={**parameters, "mrope_section": [16, 24, 24]},
  )
  return qwen25_vl.Qwen2_5_VLRotaryEmbedding(config)


@pytest.mark.parametrize(
  "family, base, settings",
  [("qwen3_vl", 5e6, QWEN3_VL), ("qwen25_vl", 1e6, QWEN25_VL)],
)
def test_rotations_are_those_of_transformers(family, base, settings):
  positions = positions_of(0, 2, 60)
  cos, sin = their_table(family, base)(torch.zeros(1), as_theirs(positions))
  want = torch.cat([cos[..., :64], sin[..., :64]], dim=-1).numpy()
  ones = jnp.zeros((2, 60, 1, 128)).at[..., :64].set(1)  # Turned to (cos, sin).
  axes = assign_frequencies(
    settings["mrope"], interleaved=settings.get("mrope_interleaved", False)
  )
  got = rope(ones, jnp.asarray(positions), base=base, axes=axes)[:, :, 0]
  np.testing.assert_allclose(got, want, atol=5e-5)  # Positions go to about 240.


def test_interleaved_axes_are_those_of_qwen3_vl():
  axes = assign_frequencies((24, 20, 20), interleaved=True)
  assert np.bincount(axes).tolist() == [24, 20, 20]
  np.testing.assert_array_equal(axes[:60], np.tile([0, 1, 2], 20))
  np.testing.assert_array_equal(axes[60:], [0] * 4)


def test_equal_positions_on_three_axes_are_those_on_one():
  x, at = jnp.asarray(normal(1, 2, 5, 2, 16)), jnp.arange(10).reshape(2, 5, 1) * 3
  axes = assign_frequencies((4, 2, 2), interleaved=True)
  turn = functools.partial(rope, x, base=100.0)
  three = turn(jnp.tile(at, (1, 1, 3)), axes=axes)
  np.testing.assert_array_equal(three, turn(at))
  np.testing.assert_array_equal(turn(at, axes=axes), turn(at))


@pytest.mark.parametrize(
  "count, axes, said",
  [
    (3, None, "positions have 3 axes, but the decoder has 1: set its `mrope`"),
    (3, (4, 4), "positions have 3 axes, but the decoder has 2"),
    (2, (4, 2), "mrope has 6 frequencies in all, but a head of width 16 has 8"),
  ],
)
def test_positions_that_do_not_suit_the_heads_are_refused(count, axes, said):
  axes = axes and assign_frequencies(axes, interleaved=False)
  with pytest.raises(ValueError, match=said):
    rope(jnp.ones((1, 2, 1, 16)), jnp.zeros((1, 2, count), int), base=10.0, axes=axes)


# Whole decoders.

SHAPE = dict(vocab=64, embed=32, mlp=48, layers=4, heads=4, kv_heads=2, tied=True)
THEIR_SHAPE = dict(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
)
ROPE = {"rope_type": "default", "rope_theta": 5e4}
MASK = np.ones((3, 12), bool)
MASK[1, :4], MASK[2, 9:] = False, False
POSITIONS = positions_of(3, 3, 12)


@functools.cache
def pair(family):
  """(transformers' text model, ours, its weights as our variables)."""
  torch.manual_seed(0)
  if family == "qwen3_vl":
    config = qwen3_vl.Qwen3VLTextConfig(
      **THEIR_SHAPE,
      head_dim=16,
      rope_parameters={**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    )
    theirs, table = qwen3_vl.Qwen3VLTextModel(config), qwen3.HF
    ours = qwen3.Model(**SHAPE, head_dim=16, mrope=(4, 2, 2), mrope_interleaved=True)
  else:
    config = qwen25_vl.Qwen2_5_VLTextConfig(
      **THEIR_SHAPE, rope_parameters={**ROPE, "mrope_section": [2, 1, 1]}
    )
    theirs, table = qwen25_vl.Qwen2_5_VLTextModel(config), qwen2.HF
    ours = qwen2.Model(**SHAPE, mrope=(2, 1, 1))
  ours = ours.clone(rope_base=5e4, eps=config.rms_norm_eps)
  with torch.no_grad():
    for p in theirs.parameters():
      p.add_(0.15 * torch.randn_like(p))
  tensors = {f"model.{name}": x.numpy() for name, x in theirs.state_dict().items()}
  tokens, mask = jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)
  init = functools.partial(ours.init, method=run_all)
  shapes = jax.eval_shape(init, jax.random.key(0), tokens, mask, tokens[..., None])
  params = convert_from_hf(table, tensors, shapes["params"])
  return theirs.eval(), ours, {"params": params}


def run_all(model, tokens, mask, positions, additions=None):
  return model(model.embed_tokens(tokens), positions, mask, additions)


TOKENS = np.random.default_rng(0).integers(0, 64, (3, 12))


def their_states(theirs, positions, **more):
  with torch.no_grad():
    return theirs(
      torch.tensor(TOKENS),
      attention_mask=torch.tensor(MASK).long(),
      position_ids=as_theirs(positions),
      **more,
    ).last_hidden_state.numpy()


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen25_vl"])
def test_hidden_states_are_those_of_transformers(family):
  theirs, ours, variables = pair(family)
  run = jax.jit(functools.partial(ours.apply, method=run_all))
  got = run(variables, TOKENS, MASK, POSITIONS)
  want = their_states(theirs, POSITIONS)
  assert np.std(want) > 0.3
  np.testing.assert_allclose(got[MASK], want[MASK], atol=2e-5)
  flat = run(variables, TOKENS, MASK, POSITIONS[..., :1])
  assert np.abs(flat - got)[MASK].max() > 0.01  # The axes matter.


def test_additions_are_deepstack_of_transformers():
  theirs, ours, variables = pair("qwen3_vl")
  visual = MASK & (np.arange(12) % 3 == 1)
  features = normal(7, 3, visual.sum(), 32)
  want = their_states(
    theirs,
    POSITIONS,
    visual_pos_masks=torch.tensor(visual),
    deepstack_visual_embeds=list(torch.tensor(features)),
  )
  additions = np.zeros((3, *visual.shape, 32), np.float32)
  additions[:, visual] = features
  run = jax.jit(functools.partial(ours.apply, method=run_all))
  got = run(variables, TOKENS, MASK, POSITIONS, additions)
  np.testing.assert_allclose(got[MASK], want[MASK], atol=2e-5)
  assert np.abs(run(variables, TOKENS, MASK, POSITIONS) - got)[MASK].max() > 0.1
