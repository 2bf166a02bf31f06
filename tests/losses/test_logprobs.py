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

from vlmrlaif_jax.losses import logprobs

sequence_logps = logprobs.sequence_logps
token_logps = jax.jit(logprobs.token_logps)
token_entropy = jax.jit(logprobs.token_entropy)
chunked_token_logps = jax.jit(
  logprobs.chunked_token_logps, static_argnames=("chunk", "temperature")
)

BATCH, TIME, VOCAB, EMBED = 2, 7, 11, 5
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(BATCH, TIME, VOCAB)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(VOCAB, size=(BATCH, TIME)))
HIDDEN = jnp.asarray(RNG.normal(size=(BATCH, TIME, EMBED)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(EMBED, VOCAB)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(BATCH, TIME)), jnp.float32)


def loop_logps(logits, tokens):
  """log p of every token but the first, one at a time, in float64."""
  logps = np.zeros(tokens.shape)
  for row, time in np.ndindex(*tokens.shape):
    if time > 0:
      scores = [math.exp(x) for x in np.asarray(logits[row, time - 1], np.float64)]
      logps[row, time] = math.log(scores[int(tokens[row, time])] / sum(scores))
  return logps


def test_token_logps_by_hand():
  logits = jnp.log(jnp.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]))
  logps = token_logps(logits, jnp.array([0, 1, 0]))
  np.testing.assert_allclose(logps, [0, math.log(0.8), math.log(0.5)], rtol=1e-6)


def test_token_logps_equal_a_loop():
  expected = loop_logps(LOGITS, TOKENS)
  np.testing.assert_allclose(token_logps(LOGITS, TOKENS), expected, rtol=1e-5)


def test_token_logps_equal_torch_cross_entropy():
  logits = torch.tensor(np.asarray(LOGITS))[:, :-1].reshape(-1, VOCAB)
  targets = torch.tensor(np.asarray(TOKENS))[:, 1:].reshape(-1).long()
  expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
  ours = token_logps(LOGITS, TOKENS)[:, 1:].reshape(-1)
  np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5)


def test_token_logps_take_any_leading_axes():
  nested = token_logps(LOGITS[None], TOKENS[None])
  row = token_logps(LOGITS[1], TOKENS[1])
  chex.assert_trees_all_close(nested[0, 1], row, rtol=1e-5)


def test_token_logps_read_video_tokens_as_id_0():
  video = TOKENS.at[0, 3].set(-1)
  zero = TOKENS.at[0, 3].set(0)
  chex.assert_trees_all_equal(token_logps(LOGITS, video), token_logps(LOGITS, zero))


def test_token_logps_of_an_id_beyond_the_vocabulary_is_nan():
  logps = token_logps(LOGITS, TOKENS.at[0, 3].set(VOCAB))
  np.testing.assert_array_equal(jnp.isnan(logps).nonzero(), [[0], [3]])


def test_token_logps_gradient_is_one_hot_minus_softmax():
  grad = jax.grad(lambda x: token_logps(x, TOKENS).sum())(LOGITS)
  odds = np.exp(LOGITS[:, :-1])
  expected = np.eye(VOCAB)[TOKENS[:, 1:]] - odds / odds.sum(-1, keepdims=True)
  np.testing.assert_allclose(grad[:, :-1], expected, atol=1e-6)
  np.testing.assert_array_equal(grad[:, -1], 0)  # It predicts nothing.


def test_token_logps_survive_huge_logits():
  logits = jnp.array([[1e5, 0.0, -jnp.inf], [0.0, 0.0, 0.0]])
  np.testing.assert_array_equal(token_logps(logits, jnp.array([0, 0])), [0, 0])
  np.testing.assert_array_equal(token_logps(logits, jnp.array([0, 1])), [0, -1e5])
  np.testing.assert_array_equal(token_logps(logits, jnp.array([0, 2])), [0, -np.inf])


def test_token_logps_of_bfloat16_are_float32():
  logits = LOGITS.astype(jnp.bfloat16)
  expected = token_logps(logits.astype(jnp.float32), TOKENS)
  chex.assert_trees_all_equal(token_logps(logits, TOKENS), expected)


def test_token_entropy_by_hand():
  logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]))
  first = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
  np.testing.assert_allclose(token_entropy(logits), [0, first, math.log(2)], rtol=1e-6)


def test_token_entropy_equals_torch():
  expected = torch.distributions.Categorical(logits=torch.tensor(np.asarray(LOGITS)))
  expected = expected.entropy().numpy()[:, :-1]
  np.testing.assert_allclose(token_entropy(LOGITS)[:, 1:], expected, rtol=1e-5)


def test_token_entropy_and_its_gradient_survive_forbidden_tokens():
  logits = jnp.array([[0.0, 0.0, -jnp.inf], [0.0, 0.0, 0.0]])
  entropy, grad = jax.value_and_grad(lambda x: token_entropy(x).sum())(logits)
  np.testing.assert_allclose(entropy, math.log(2), rtol=1e-6)
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
  return token_logps(logits, TOKENS), token_entropy(logits)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_equals_whole(chunk):
  ours = chunked_token_logps(HIDDEN, HEAD, TOKENS, chunk=chunk)
  chex.assert_trees_all_close(ours, whole(HIDDEN, HEAD), atol=1e-5)


@pytest.mark.parametrize("output", [0, 1], ids=["logps", "entropy"])
def test_chunked_gradient_equals_whole(output):
  pick = lambda both: jnp.sum(WEIGHTS * both[output])
  chunked = lambda h, w: pick(chunked_token_logps(h, w, TOKENS, chunk=3))
  ours = jax.jit(jax.grad(chunked, (0, 1)))(HIDDEN, HEAD)
  theirs = jax.jit(jax.grad(lambda h, w: pick(whole(h, w)), (0, 1)))(HIDDEN, HEAD)
  chex.assert_trees_all_close(ours, theirs, atol=1e-5)


def test_chunked_divides_logits_by_temperature():
  ours = chunked_token_logps(HIDDEN, HEAD, TOKENS, chunk=4, temperature=0.5)
  chex.assert_trees_all_close(ours, whole(HIDDEN, HEAD, 0.5), atol=1e-5)


def test_chunked_takes_any_leading_axes():
  single = chunked_token_logps(HIDDEN[1], HEAD, TOKENS[1], chunk=3)
  nested = chunked_token_logps(HIDDEN[None], HEAD, TOKENS[None], chunk=3)
  chex.assert_trees_all_close(
    single, jax.tree.map(lambda x: x[0, 1], nested), rtol=1e-6
  )


def test_chunked_reads_video_tokens_as_id_0():
  video, zero = (TOKENS.at[0, 3].set(token) for token in (-1, 0))
  chex.assert_trees_all_equal(
    chunked_token_logps(HIDDEN, HEAD, video, chunk=3),
    chunked_token_logps(HIDDEN, HEAD, zero, chunk=3),
  )


def test_chunked_multiplies_bfloat16_into_float32():
  hidden, head = HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
  exact = whole(hidden.astype(jnp.float32), head.astype(jnp.float32))
  ours = chunked_token_logps(hidden, head, TOKENS, chunk=3)
  chex.assert_trees_all_close(ours, exact, atol=1e-5)


def test_chunked_refuses_a_chunk_of_nothing():
  with pytest.raises(ValueError, match="chunk must be 1 or more time steps, not 0"):
    chunked_token_logps(HIDDEN, HEAD, TOKENS, chunk=0)


def test_chunked_never_holds_all_logits_nor_does_its_gradient():
  batch, time, vocab = 2, 256, 4096
  hidden = jnp.zeros((batch, time, 8))
  head, tokens = jnp.zeros((8, vocab)), jnp.zeros((batch, time), int)

  def temporary_bytes(logps):
    grad = jax.jit(jax.grad(lambda h: logps(h).sum()))
    return grad.lower(hidden).compile().memory_analysis().temp_size_in_bytes

  all_logits = batch * time * vocab * 4
  chunked = lambda h: chunked_token_logps(h, head, tokens, chunk=4)[0]
  assert temporary_bytes(lambda h: token_logps(h @ head, tokens)) >= all_logits
  assert temporary_bytes(chunked) < all_logits / 8


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_chunked_makes_no_array_of_all_logits_of_a_7b_model(backward):
  batch, time, embed, vocab = 16, 2048, 4096, 32_000
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  inputs = bf16((batch, time, embed)), bf16((embed, vocab))
  tokens = jax.ShapeDtypeStruct((batch, time), jnp.int32)

  def loss(hidden, head, tokens):
    logps, entropy = chunked_token_logps(hidden, head, tokens, chunk=128)
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
  loss = lambda h, w: chunked_token_logps(h, w, tokens, chunk=3)[0].sum()
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
  loss = lambda h, w: chunked_token_logps(h, w, tokens, chunk=chunk)[0].sum()
  text = jax.jit(jax.grad(loss)).lower(*inputs).compile().as_text()
  assert f"f32[2,{chunk // 4},{VOCAB}]" in text  # A device's share of a chunk's logits.
  assert f"f32[2,{chunk},{VOCAB}]" not in text
  moved = re.findall(r"= \w+\[(\S+?)\]\S* (?:all-|collective-permute)", text)
  assert set(moved) <= {"2,1"}  # A token's log-probability, to the token after it.
