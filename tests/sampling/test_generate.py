import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.helpers.rows import text_batch
from tests.losses.whole_logits import token_logps
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import VIDEO_TOKEN, continue_positions
from vlmrlaif_jax.huggingface.convert import convert_from_hf
from vlmrlaif_jax.models import clip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.sampling.generate import generate

EOS, PAD, NEW = 2, 0, 6
MODEL = vlm.VLM(
  clip.VisionTower(**clip.VARIANTS["tiny"]),
  Projector(32),
  llama.Model(**llama.VARIANTS["tiny"], rank=4),
)
VIDEO_LENGTH = 2 + 16  # Tokens of two frames.
ROWS = [[5, 6, 7], [8], [9, 10]]
START = 1 + VIDEO_LENGTH + 3


def prompts_of(rows):
  tokens = np.full((len(rows), START), PAD)
  for i, row in enumerate(rows):
    row = [1, *[VIDEO_TOKEN] * VIDEO_LENGTH, *row]
    tokens[i, -len(row) :] = row
  mask = jnp.asarray(tokens != PAD)
  features = np.random.default_rng(0).normal(size=(3, 2, 16, 32))[: len(rows)]
  return text_batch(
    jnp.asarray(features, jnp.float32), jnp.asarray(tokens), mask, mask & False
  )


@pytest.fixture(scope="module")
def variables():
  variables = jax.jit(MODEL.init)(jax.random.key(0), prompts_of(ROWS))
  noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape)
  return jax.jit(lambda tree: jax.tree.map(noise, tree))(variables)


@functools.cache
def sampler(**settings):
  settings = dict(max_new=NEW, temperature=1.0, stops=(EOS,), pad=PAD) | settings
  return jax.jit(functools.partial(generate, MODEL, **settings))


def responses(sampled):
  return np.asarray(sampled.batch.tokens[:, START:])


forward = jax.jit(MODEL.apply)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_equal_those_of_a_full_forward(variables, temperature):
  prompts = prompts_of(ROWS)
  out = sampler(temperature=temperature, samples=2)(
    variables, prompts, jax.random.key(0)
  )
  want = token_logps(forward(variables, out.batch) / temperature, out.batch.tokens)
  where = np.asarray(out.batch.loss_mask)
  assert where.sum() > 3 * NEW
  np.testing.assert_allclose(out.logps[where], want[where], atol=1e-5)
  np.testing.assert_array_equal(out.logps[~where], 0)


def test_layers_that_are_unstacked_once_sample_the_same(variables):
  unstacked = MODEL.clone(llm=MODEL.llm.clone(unstack=True))
  assert "lora" in variables and unstacked.apply(variables, method="unstack_layers")
  settings = dict(max_new=NEW, temperature=1.0, stops=(EOS,), pad=PAD)
  sample = jax.jit(functools.partial(generate, unstacked, **settings))
  got = sample(variables, prompts_of(ROWS), jax.random.key(0))
  want = sampler()(variables, prompts_of(ROWS), jax.random.key(0))
  np.testing.assert_array_equal(got.batch.tokens, want.batch.tokens)
  np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)


def test_greedy_is_the_argmax_of_a_full_forward_step_by_step(variables):
  prompts = prompts_of(ROWS)
  got = responses(
    sampler(temperature=0.0, stops=(-5,))(variables, prompts, jax.random.key(0))
  )
  widen = lambda x: jnp.pad(x, [(0, 0), (0, NEW)])
  every = jnp.ones((len(ROWS), NEW), bool)
  following = continue_positions(prompts, every)
  batch = prompts._replace(
    tokens=widen(prompts.tokens),
    mask=widen(prompts.mask),
    positions=jnp.concatenate([prompts.positions, following], axis=1),
  )
  for t in range(NEW):
    at = START + t
    token = jnp.argmax(forward(variables, batch)[:, at - 1], -1)
    np.testing.assert_array_equal(got[:, t], token)
    batch = batch._replace(
      tokens=batch.tokens.at[:, at].set(token), mask=batch.mask.at[:, at].set(True)
    )


def greedy_eos(variables):
  """An id that greedy decoding reaches in the middle of some response."""
  free = responses(
    sampler(temperature=0.0, stops=(-5,))(
      variables, prompts_of(ROWS), jax.random.key(0)
    )
  )
  return free, int(free[0, 2])


def test_a_response_ends_at_the_first_of_two_ids_and_is_padded(variables):
  free, eos = greedy_eos(variables)
  other = next(token for token in free[1, 1:] if token not in free[0])
  out = sampler(temperature=0.0, stops=(eos, int(other)))(
    variables, prompts_of(ROWS), jax.random.key(0)
  )
  for row, plain, mask in zip(
    responses(out), free, out.batch.loss_mask[:, START:], strict=True
  ):
    ends = np.flatnonzero((plain == eos) | (plain == other))
    length = ends[0] + 1 if len(ends) else NEW
    np.testing.assert_array_equal(row[:length], plain[:length])
    np.testing.assert_array_equal(row[length:], PAD)
    np.testing.assert_array_equal(mask, np.arange(NEW) < length)


def test_stopping_early_changes_nothing(variables):
  # One row alone stops the loop at its end; beside longer rows the loop goes on.
  _, eos = greedy_eos(variables)
  settings = dict(temperature=0.0, stops=(eos,))
  alone = sampler(**settings)(variables, prompts_of(ROWS[:1]), jax.random.key(0))
  beside = sampler(**settings)(variables, prompts_of(ROWS), jax.random.key(0))
  assert responses(alone)[0, -1] == PAD
  np.testing.assert_array_equal(alone.batch.tokens[0], beside.batch.tokens[0])
  np.testing.assert_array_equal(alone.batch.mask[0], beside.batch.mask[0])
  np.testing.assert_allclose(alone.logps[0], beside.logps[0], atol=1e-5)


def test_loss_mask_marks_real_tokens_of_the_response(variables):
  out = sampler()(variables, prompts_of(ROWS), jax.random.key(0))
  np.testing.assert_array_equal(out.batch.loss_mask[:, :START], False)
  np.testing.assert_array_equal(out.batch.mask[:, :START], prompts_of(ROWS).mask)
  np.testing.assert_array_equal(
    out.batch.loss_mask[:, START:], out.batch.mask[:, START:]
  )


def test_a_row_does_not_depend_on_its_neighbours(variables):
  prompts, order = prompts_of(ROWS), jnp.array([2, 0])
  some = jax.tree.map(lambda x: x[order], prompts)
  run, key = sampler(samples=2), jax.random.key(0)
  every = run(variables, prompts, key, ids=jnp.array([7, 8, 9]))
  few = run(variables, some, key, ids=jnp.array([9, 7]))
  np.testing.assert_array_equal(responses(few), responses(every)[[4, 5, 0, 1]])


def test_samples_of_a_prompt_differ_and_stand_together(variables):
  prompts = prompts_of(ROWS)
  out = sampler(samples=2)(variables, prompts, jax.random.key(0))
  np.testing.assert_array_equal(
    out.batch.tokens[:, :START], np.repeat(prompts.tokens, 2, axis=0)
  )
  assert (responses(out)[::2] != responses(out)[1::2]).any(axis=1).all()


def test_the_key_decides(variables):
  run, prompts = sampler(), prompts_of(ROWS)
  one, same, other = (
    responses(run(variables, prompts, jax.random.key(k))) for k in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()


def test_ids_beyond_the_tokenizer_are_never_sampled(variables):
  run = sampler(temperature=5.0, vocab=4, samples=8, stops=(-5,))
  assert responses(run(variables, prompts_of(ROWS), jax.random.key(0))).max() == 3


def test_pixels_are_encoded(variables):
  prompts = prompts_of(ROWS)
  pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3))
  prompts = prompts._replace(video=jnp.asarray(pixels, jnp.uint8))
  encoded = vlm.encode_video(MODEL, variables, prompts)
  run, key = sampler(), jax.random.key(0)
  got, want = run(variables, prompts, key), run(variables, encoded, key)
  np.testing.assert_array_equal(got.batch.tokens, want.batch.tokens)
  np.testing.assert_allclose(got.batch.video, want.batch.video, atol=1e-5)


def test_prompts_of_one_shape_compile_once(variables):
  run = jax.jit(
    functools.partial(
      generate, MODEL, max_new=2, temperature=1.0, stops=(EOS,), pad=PAD
    )
  )
  for rows, key in ((ROWS, 0), (ROWS[::-1], 1)):
    run(variables, prompts_of(rows), jax.random.key(key))
  assert run._cache_size() == 1


def test_a_mesh_samples_what_one_device_samples(variables):
  prompts = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0)[:4], prompts_of(ROWS))
  run, key = sampler(), jax.random.key(0)
  want = run(variables, prompts, key)
  mesh = sharding.make_mesh(data=2, tensor=2, fsdp=1)
  places = sharding.shard_by_rules(variables, vlm.SHARDING, mesh)
  got = run(jax.device_put(variables, places), sharding.shard_batch(prompts, mesh), key)
  np.testing.assert_array_equal(got.batch.tokens, want.batch.tokens)
  np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)


def test_greedy_equals_transformers_generate():
  shape = llama.VARIANTS["tiny"]
  torch.manual_seed(0)
  hf = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=shape["vocab"],
      hidden_size=shape["embed"],
      intermediate_size=shape["mlp"],
      num_hidden_layers=shape["layers"],
      num_attention_heads=shape["heads"],
      num_key_value_heads=shape["kv_heads"],
      rms_norm_eps=1e-5,
      initializer_range=0.15,
    )
  ).eval()
  hf.generation_config.eos_token_id = None
  tokens = np.array([[0, 0, 0, 1, 9, 8], [1, 7, 6, 5, 4, 3]])
  mask = np.array([[0, 0, 0, 1, 1, 1], [1] * 6], bool)
  want = hf.generate(
    torch.tensor(tokens),
    attention_mask=torch.tensor(mask).long(),
    do_sample=False,
    max_new_tokens=12,
    pad_token_id=PAD,
  ).numpy()

  prompts = text_batch(
    jnp.zeros((2, 1, 16, 32)), *map(jnp.asarray, (tokens, mask, mask))
  )
  variables = MODEL.init(jax.random.key(0), prompts)
  tensors = {name: tensor.numpy() for name, tensor in hf.state_dict().items()}
  shapes = jax.eval_shape(lambda: variables["params"]["llm"])
  llm = convert_from_hf(llama.HF, tensors, shapes)
  variables = {"params": {**variables["params"], "llm": llm}}
  run = sampler(temperature=0.0, max_new=12, stops=(-5,))
  got = run(variables, prompts, jax.random.key(0)).batch.tokens
  assert len(np.unique(want[:, 6:])) > 6  # Or a constant model would pass.
  np.testing.assert_array_equal(got, want)
