"""From logits to log-probabilities and entropies of given tokens."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.losses import whole_logits
from vlmrlaif_jax.losses import logprobs

sequence_logps = logprobs.sum_logps
token_logps = jax.jit(logprobs.chunked_token_logps, static_argnames="chunk")
target_logps = jax.jit(
  logprobs.chunked_target_logps, static_argnames=("chunk", "temperature")
)

BATCH, TIME, VOCAB, EMBED = 2, 7, 11, 5
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(BATCH, TIME, VOCAB)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(VOCAB, size=(BATCH, TIME)))
HIDDEN = jnp.asarray(RNG.normal(size=(BATCH, TIME, EMBED)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(EMBED, VOCAB)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(BATCH, TIME)), jnp.float32)


def of_logits(logits, tokens):
  """Log p of each token, where the hidden states are the logits."""
  return token_logps(logits, jnp.eye(logits.shape[-1]), tokens, chunk=3)


def test_token_logps_by_hand():
  logits = jnp.log(jnp.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]))
  logps = of_logits(logits, jnp.array([0, 1, 0]))
  np.testing.assert_allclose(logps, [0, math.log(0.8), math.log(0.5)], rtol=1e-6)


def test_logps_and_entropy_equal_torch():
  theirs = torch.distributions.Categorical(logits=torch.tensor(np.asarray(LOGITS)))
  logps, entropy = target_logps(LOGITS, jnp.eye(VOCAB), TOKENS, chunk=3)
  expected = theirs.log_prob(torch.tensor(np.asarray(TOKENS)))
  np.testing.assert_allclose(logps, expected.numpy(), rtol=1e-5)
  np.testing.assert_allclose(entropy, theirs.entropy().numpy(), rtol=1e-5)


def test_token_logps_of_an_id_beyond_the_vocabulary_is_nan():
  logps = of_logits(LOGITS, TOKENS.at[0, 3].set(VOCAB))
  np.testing.assert_array_equal(jnp.isnan(logps).nonzero(), [[0], [3]])


def test_token_logps_gradient_is_one_hot_minus_softmax():
  grad = jax.grad(lambda x: of_logits(x, TOKENS).sum())(LOGITS)
  odds = np.exp(LOGITS[:, :-1])
  expected = np.eye(VOCAB)[TOKENS[:, 1:]] - odds / odds.sum(-1, keepdims=True)
  np.testing.assert_allclose(grad[:, :-1], expected, atol=1e-6)
  np.testing.assert_array_equal(grad[:, -1], 0)  # It predicts nothing.


def test_logps_survive_huge_and_forbidden_logits():
  head = jnp.array([[1e5, 0.0, -jnp.inf]])
  logps = lambda token: target_logps(jnp.ones((1, 1)), head, token, chunk=1)[0]
  found = [logps(jnp.array([token])).item() for token in range(3)]
  assert found == [0, -1e5, -np.inf]


def test_entropy_and_its_gradient_survive_forbidden_tokens():
  head = jnp.array([[0.0, 0.0, -jnp.inf]])
  entropy = lambda head: target_logps(
    jnp.ones((1, 1)), head, jnp.zeros(1, int), chunk=1
  )[1].sum()
  found, grad = jax.value_and_grad(entropy)(head)
  np.testing.assert_allclose(found, math.log(2), rtol=1e-6)
  np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_sequence_logps_sum_over_the_mask():
  logps = jnp.array([[-1.0, -2.0, -4.0], [-8.0, jnp.nan, jnp.nan]])
  mask = jnp.array([[True, False, True], [True, False, False]])
  np.testing.assert_array_equal(sequence_logps(logps, mask), [-5, -8])


def test_sequence_logps_gradient_is_the_mask():
  mask = jnp.array([True, False, True])
  grad = jax.grad(sequence_logps)(jnp.array([-1.0, jnp.nan, -2.0]), mask)
  np.testing.assert_array_equal(grad, [1, 0, 1])


def whole(hidden, head, temperature=1.0):
  logits = hidden @ head / temperature
  return whole_logits.target_logps(logits, TOKENS), whole_logits.entropy(logits)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_equals_whole(chunk):
  ours = target_logps(HIDDEN, HEAD, TOKENS, chunk=chunk)
  chex.assert_trees_all_close(ours, whole(HIDDEN, HEAD), atol=1e-5)


@pytest.mark.parametrize("output", [0, 1], ids=["logps", "entropy"])
def test_chunked_gradient_equals_whole(output):
  pick = lambda both: jnp.sum(WEIGHTS * both[output])
  chunked = lambda h, w: pick(target_logps(h, w, TOKENS, chunk=3))
  ours = jax.jit(jax.grad(chunked, (0, 1)))(HIDDEN, HEAD)
  theirs = jax.jit(jax.grad(lambda h, w: pick(whole(h, w)), (0, 1)))(HIDDEN, HEAD)
  chex.assert_trees_all_close(ours, theirs, atol=1e-5)


def test_chunked_divides_logits_by_temperature():
  ours = target_logps(HIDDEN, HEAD, TOKENS, chunk=4, temperature=0.5)
  chex.assert_trees_all_close(ours, whole(HIDDEN, HEAD, 0.5), atol=1e-5)


def test_token_logps_take_any_leading_axes():
  single = token_logps(HIDDEN[1], HEAD, TOKENS[1], chunk=3)
  nested = token_logps(HIDDEN[None], HEAD, TOKENS[None], chunk=3)
  chex.assert_trees_all_close(single, nested[0, 1], rtol=1e-6)


def test_token_logps_read_video_tokens_as_id_0():
  video, zero = (TOKENS.at[0, 3].set(token) for token in (-1, 0))
  chex.assert_trees_all_equal(
    token_logps(HIDDEN, HEAD, video, chunk=3),
    token_logps(HIDDEN, HEAD, zero, chunk=3),
  )


def test_chunked_multiplies_bfloat16_into_float32():
  hidden, head = HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
  exact = whole(hidden.astype(jnp.float32), head.astype(jnp.float32))
  ours = target_logps(hidden, head, TOKENS, chunk=3)
  chex.assert_trees_all_close(ours, exact, atol=1e-5)


def test_chunked_refuses_a_chunk_of_nothing():
  with pytest.raises(ValueError, match="chunk must be 1 or more time steps, not 0"):
    token_logps(HIDDEN, HEAD, TOKENS, chunk=0)


def test_chunked_never_holds_all_logits_nor_does_its_gradient():
  batch, time, vocab = 2, 256, 4096
  hidden = jnp.zeros((batch, time, 8))
  head, tokens = jnp.zeros((8, vocab)), jnp.zeros((batch, time), int)

  def temporary_bytes(logps):
    grad = jax.jit(jax.grad(lambda h: logps(h).sum()))
    return grad.lower(hidden).compile().memory_analysis().temp_size_in_bytes

  all_logits = batch * time * vocab * 4
  chunked = lambda h: token_logps(h, head, tokens, chunk=4)
  at_once = lambda h: whole_logits.token_logps(h @ head, tokens)
  assert temporary_bytes(at_once) >= all_logits
  assert temporary_bytes(chunked) < all_logits / 8


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_chunked_makes_no_array_of_all_logits_of_a_7b_model(backward):
  batch, time, embed, vocab = 16, 2048, 4096, 32_000
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  inputs = bf16((batch, time, embed)), bf16((embed, vocab))
  tokens = jax.ShapeDtypeStruct((batch, time), jnp.int32)

  def loss(hidden, head, tokens):
    logps, entropy = target_logps(hidden, head, tokens, chunk=128)
    return jnp.sum(logps + entropy)

  run = jax.jit(jax.grad(loss, (0, 1)) if backward else loss)
  compiled = run.lower(*inputs, tokens).compile()  # Nothing is computed.
  shapes = re.findall(r"\w\[([\d,]+)\]", compiled.as_text())
  sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
  assert max(sizes) == max(batch * time * embed, embed * vocab)
  all_logits = batch * time * vocab * 4
  assert compiled.memory_analysis().temp_size_in_bytes < all_logits


def test_chunked_gradient_leaves_rows_on_their_devices():
  mesh = jax.make_mesh((2, 2), ("rows", "vocab"), (AxisType.Auto,) * 2)
  place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  inputs = (place(HIDDEN, "rows"), place(HEAD[:, :10], None, "vocab"))
  tokens = place(TOKENS % 10, "rows")
  loss = lambda h, w: token_logps(h, w, tokens, chunk=3).sum()
  text = jax.jit(jax.grad(loss)).lower(*inputs).compile().as_text()
  assert "all-reduce" in text  # Over the parts of the vocabulary.
  assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("chunk", [4, 8])
def test_chunked_leaves_time_on_its_devices(chunk):
  """16 steps, 4 on a device: every chunk has as many of each."""
  mesh = jax.make_mesh((4,), ("time",), (AxisType.Auto,))
  hidden = jnp.tile(HIDDEN[:1, :1], (2, 16, 1))
  inputs = (jax.device_put(hidden, NamedSharding(mesh, P(None, "time"))), HEAD)
  tokens = jnp.zeros((2, 16), int)
  loss = lambda h, w: token_logps(h, w, tokens, chunk=chunk).sum()
  text = jax.jit(jax.grad(loss)).lower(*inputs).compile().as_text()
  assert f"f32[2,{chunk // 4},{VOCAB}]" in text  # A device's share of a chunk's logits.
  assert f"f32[2,{chunk},{VOCAB}]" not in text
  moved = re.findall(r"= \w+\[(\S+?)\]\S* (?:all-|collective-permute)", text)
  assert set(moved) <= {"2,1"}  # A token's log-probability, to the token after it.
