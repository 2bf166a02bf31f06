import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.rows import text_batch
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import (
  VIDEO_TOKEN,
  Batch,
  Groups,
  continue_positions,
  flatten_groups,
)
from vlmrlaif_jax.models import clip, siglip, vlm
from vlmrlaif_jax.models.decoders import llama, qwen2, qwen3
from vlmrlaif_jax.models.projector import Projector

FRAMES, TOKENS_PER_VIDEO = 3, 3 + 16


def build(**fields):
  tower = clip.VisionTower(**clip.VARIANTS["tiny"])
  llm = llama.Model(**llama.VARIANTS["tiny"], rank=4)
  return vlm.VLM(tower, Projector(32), llm, **fields)


def batch_of(rows, side="left", time=26):
  """Token lists, each after a video, padded on one side."""
  tokens, mask = np.zeros((len(rows), time), int), np.zeros((len(rows), time), bool)
  for i, row in enumerate(rows):
    row = [1] + [VIDEO_TOKEN] * TOKENS_PER_VIDEO + row
    at = slice(time - len(row), None) if side == "left" else slice(len(row))
    tokens[i, at], mask[i, at] = row, True
  video = np.random.default_rng(0).integers(0, 256, (len(rows), FRAMES, 16, 16, 3))
  return text_batch(
    jnp.asarray(video, jnp.uint8), jnp.asarray(tokens), jnp.asarray(mask), mask & False
  )


MODEL, SCALAR = build(), build(scalar_head=True)


def apply(variables, *inputs, method="__call__", model=MODEL):
  return jax.jit(model.apply, static_argnames="method")(
    variables, *inputs, method=method
  )


ROWS = [[5, 6, 7, 8], [9, 10]]
BATCH = batch_of(ROWS)


@pytest.fixture(scope="module")
def variables():
  variables = jax.jit(build(scalar_head=True).init)(jax.random.key(0), BATCH)
  noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape)
  return jax.jit(lambda tree: jax.tree.map(noise, tree))(variables)


def test_merge_video_puts_features_in_order():
  x = jnp.zeros((2, 5, 1))
  video = jnp.array([[1.0, 2.0], [3.0, 4.0]])[..., None]
  places = jnp.array([[0, 1, 1, 0, 0], [0, 0, 1, 0, 1]], bool)
  want = [[0, 1, 2, 0, 0], [0, 0, 3, 0, 4]]
  np.testing.assert_array_equal(vlm.merge_video(x, video, places)[..., 0], want)


def test_logits_do_not_depend_on_the_side_of_padding(variables):
  right = batch_of(ROWS, "right")
  logits = lambda batch: apply(variables, batch)[batch.mask]
  np.testing.assert_allclose(logits(BATCH), logits(right), atol=1e-5)


def test_logits_see_the_video(variables):
  dark = BATCH._replace(video=jnp.zeros_like(BATCH.video))
  logits = lambda batch: apply(variables, batch)[:, -1]
  assert np.abs(logits(BATCH) - logits(dark)).max() > 1e-3


def test_a_video_may_come_as_features(variables):
  features = vlm.encode_video(MODEL, variables, BATCH)
  assert features.video.shape == (2, FRAMES, 16, 32)
  got, want = (apply(variables, batch) for batch in (features, BATCH))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_encode_video_lets_features_through(variables):
  features = vlm.encode_video(MODEL, variables, BATCH)
  again = vlm.encode_video(MODEL, variables, features)
  np.testing.assert_array_equal(again.video, features.video)


def test_encode_normalises_raw_pixels_only(variables):
  raw = apply(variables, BATCH.video, method="encode")
  pixels = MODEL.vision.normalize(BATCH.video)
  ready = apply(variables, pixels, method="encode")
  np.testing.assert_allclose(raw, ready, atol=1e-5)


def test_init_makes_the_same_variables_from_features_as_from_pixels():
  features = BATCH._replace(video=jnp.zeros((2, FRAMES, 16, 32)))
  init = lambda batch: jax.eval_shape(build().init, jax.random.key(0), batch)
  assert jax.tree.map(np.shape, init(features)) == jax.tree.map(np.shape, init(BATCH))


def test_only_the_scalar_flag_makes_a_head():
  params = lambda model: jax.eval_shape(model.init, jax.random.key(0), BATCH)["params"]
  plain = {"vision", "projector", "llm"}
  assert set(params(build())) == plain
  assert set(params(build(scalar_head=True))) == plain | {"head"}


def test_scalar_head_starts_uniform_with_no_bias():
  model = vlm.VLM(
    clip.VisionTower(**clip.VARIANTS["tiny"]),
    Projector(256),
    llama.Model(vocab=8, embed=256, mlp=8, layers=1, heads=1, kv_heads=1),
    scalar_head=True,
  )
  head = jax.jit(model.init)(jax.random.key(0), BATCH)["params"]["head"]
  assert np.all(np.abs(head["kernel"]) <= 1 / 16)
  np.testing.assert_allclose(np.std(head["kernel"]), 1 / 16 / 3**0.5, rtol=0.1)
  np.testing.assert_array_equal(head["bias"], [0])


@pytest.mark.parametrize("side, last", [("left", [25, 25]), ("right", [23, 21])])
def test_scores_are_the_scalars_of_the_last_real_tokens(variables, side, last):
  batch = batch_of(ROWS, side)
  scalars = apply(variables, batch, model=SCALAR, method="scalars")
  scores = apply(variables, batch, model=SCALAR, method="scores")
  np.testing.assert_allclose(scores, [scalars[0, last[0]], scalars[1, last[1]]])


def test_scalars_are_hidden_times_the_head(variables):
  head = variables["params"]["head"]
  hidden = apply(variables, BATCH, method="hidden")
  want = (hidden @ head["kernel"] + head["bias"])[..., 0]
  got = apply(variables, BATCH, model=SCALAR, method="scalars")
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_hidden_times_head_kernel_are_the_logits(variables):
  hidden = apply(variables, BATCH, method="hidden")
  kernel = apply(variables, method="head_kernel")
  want = apply(variables, BATCH)
  np.testing.assert_allclose(hidden @ kernel, want, atol=1e-5)
  got = apply(variables, hidden, method="compute_logits")
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_hidden_takes_positions_of_the_batch_and_attention_of_the_caller(variables):
  # Two answers to one question side by side, each blind to the other.
  video = [1] + [VIDEO_TOKEN] * TOKENS_PER_VIDEO
  tokens = jnp.array([video + [5, 6, 7, 8]])
  attention = jnp.tri(24, dtype=bool)[None].at[:, 22:, 20:22].set(False)
  positions = jnp.array([[*range(22), 20, 21]])[..., None]
  real, clip = jnp.ones_like(tokens, bool), BATCH.video[:1]
  both = Batch(clip, tokens, real, ~real, positions)
  got = apply(variables, both, attention, method="hidden")
  second = text_batch(clip, jnp.array([video + [7, 8]]), real[:, :22], ~real)
  want = apply(variables, second, method="hidden")
  np.testing.assert_allclose(got[:, 22:], want[:, 20:], atol=1e-5)


def groups_of(rng):
  """Two groups of three responses of unequal lengths."""
  tokens = jnp.asarray(rng.integers(3, 60, (2, 3, 5)))
  mask = jnp.arange(5) < jnp.asarray([[5, 2, 1], [3, 4, 5]])[..., None]
  positions = continue_positions(BATCH, mask)
  return Groups(BATCH, tokens, mask, mask, positions)


def test_a_shared_prompt_changes_no_hidden_state(variables):
  groups = groups_of(np.random.default_rng(1))
  rows = flatten_groups(groups)
  want = apply(variables, rows, method="hidden").reshape(2, 3, 31, -1)
  states = jax.jit(MODEL.apply, static_argnames=("shared", "method"))
  real = np.asarray(groups.mask)
  for shared in (False, True):
    got = states(variables, groups, shared=shared, method="hidden_groups")
    np.testing.assert_allclose(got.prompts, want[:, 0, 25], atol=1e-5)
    np.testing.assert_allclose(got.responses[real], want[:, :, 26:][real], atol=1e-5)


def test_group_scores_are_those_of_rows(variables):
  groups = groups_of(np.random.default_rng(1))
  want = apply(variables, flatten_groups(groups), model=SCALAR, method="scores")
  score = lambda given: SCALAR.apply(given, groups, shared=True, method="group_scores")
  np.testing.assert_allclose(jax.jit(score)(variables), want.reshape(2, 3), atol=1e-5)


def test_cached_decoding_equals_the_full_forward(variables):
  want, cut = apply(variables, BATCH, method="hidden"), 24
  prompt = Batch(BATCH.video, *(x[:, :cut] for x in BATCH[1:]))
  hidden, caches = MODEL.apply(variables, prompt, 26, method="prefill")
  np.testing.assert_allclose(hidden, want[:, cut - 1], atol=1e-5)
  for t in range(cut, 26):
    token, position = BATCH.tokens[:, t], BATCH.positions[:, t, 0]
    seen = BATCH.mask & (jnp.arange(26) <= t)
    hidden, caches = apply(
      variables, token, position, jnp.int32(t), seen, caches, method="decode"
    )
    np.testing.assert_allclose(hidden, want[:, t], atol=1e-5)


def test_bfloat16_logits_are_near_those_in_float32(variables):
  types = dict(dtype="bfloat16", param_dtype="bfloat16")
  model = vlm.VLM(
    clip.VisionTower(**clip.VARIANTS["tiny"], **types),
    Projector(32, dtype="bfloat16"),
    llama.Model(**llama.VARIANTS["tiny"], rank=4, **types),
  )
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
  half = {"params": params, "lora": variables["lora"]}
  got = apply(half, BATCH, model=model)[BATCH.mask]
  want = apply(variables, BATCH)[BATCH.mask]
  assert got.dtype == jnp.float32
  assert np.mean(np.abs(got - want)) < 0.03 * np.std(want)


def test_encode_normalises_as_its_tower_wants_it():
  tower = siglip.Model(**siglip.VARIANTS["tiny"])
  model = vlm.VLM(tower, Projector(32), llama.Model(**llama.VARIANTS["tiny"]))
  frames = BATCH.video.repeat(2, axis=2).repeat(2, axis=3)[:, :, :18, :18]
  batch = BATCH._replace(video=frames)
  variables = jax.jit(model.init)(jax.random.key(0), batch)
  raw = apply(variables, frames, model=model, method="encode")
  ready = apply(variables, frames / 127.5 - 1, model=model, method="encode")
  np.testing.assert_allclose(raw, ready, atol=1e-5)


@pytest.mark.parametrize(
  "tower, llm",
  [
    (clip.Model(**clip.VARIANTS["l14_336"]), llama.Model(**llama.VARIANTS["7b"])),
    (clip.Model(**clip.VARIANTS["tiny"]), qwen2.Model(**qwen2.VARIANTS["tiny"])),
    (siglip.Model(**siglip.VARIANTS["tiny"]), qwen3.Model(**qwen3.VARIANTS["tiny"])),
  ],
  ids=["clip-llama", "clip-qwen2", "siglip-qwen3"],
)
def test_every_parameter_has_a_sharding_rule(tower, llm):
  model = vlm.VLM(tower, Projector(llm.embed), llm.clone(rank=8), scalar_head=True)
  batch = BATCH._replace(
    video=jnp.zeros((2, FRAMES, tower.image, tower.image, 3), jnp.uint8)
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
  placed = sharding.shard_by_rules(
    shapes, vlm.SHARDING, sharding.make_mesh(fsdp=2, tensor=2)
  )
  assert placed["params"]["head"]["kernel"].is_fully_replicated
  assert not placed["params"]["llm"]["blocks"]["q"]["kernel"].is_fully_replicated


def test_logits_on_a_mesh_equal_those_on_one_device(variables):
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  places = sharding.shard_by_rules(variables, vlm.SHARDING, mesh)
  spread = jax.device_put(variables, places), sharding.shard_batch(BATCH, mesh)
  got = jax.jit(MODEL.apply)(*spread)
  np.testing.assert_allclose(got, apply(variables, BATCH), atol=1e-5)
