"""Chunked attention, against all weights at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.ops.test_attention import assert_same, inputs, results
from vlmrlaif_jax.models.ops import chunked_attention


@pytest.fixture
def small_chunks(monkeypatch):
  monkeypatch.setattr(chunked_attention, "_CHUNK", 8)


def segments_of(*sizes):
  """A row of segments of these many tokens; negative ones are padding."""
  ids = [0 if n < 0 else 1 + sum(m > 0 for m in sizes[:i]) for i, n in enumerate(sizes)]
  return np.repeat(ids, np.abs(sizes))


@pytest.mark.parametrize("time", [16, 27])  # Whole chunks; a rest.
def test_chunked_equals_xla(small_chunks, time):
  given = inputs(3, time)
  assert_same(results("chunked", *given), results("xla", *given))


@pytest.mark.parametrize("heads", [(4, 4), (6, 1)])
def test_chunked_equals_xla_for_any_sharing_of_keys(small_chunks, heads):
  given = inputs(2, 19, *heads)
  assert_same(results("chunked", *given), results("xla", *given))


def test_chunked_equals_xla_in_segments(small_chunks):
  q, k, v, _ = inputs(2, 30)
  rows = [segments_of(9, 3, 14, -4), segments_of(-9, 20, 1)]
  given = q, k, v, jnp.asarray(np.stack(rows))
  got, want = results("chunked", *given), results("xla", *given)
  assert_same(got, want)


def test_rows_of_padding_alone_are_finite(small_chunks):
  q, k, v, mask = inputs(2, 20)
  got = results("chunked", q, k, v, mask.at[0].set(False))
  for name, x in got.items():
    assert np.isfinite(x).all(), name


def test_chunks_that_no_segment_of_a_query_reaches_into_are_passed_over():
  rows = [segments_of(8, 16, 8), segments_of(4, 10, 10, -8)]
  by_chunk = jnp.asarray(np.stack(rows)).reshape(2, 4, 8).swapaxes(0, 1)
  np.testing.assert_array_equal(
    chunked_attention._find_first_visible(by_chunk), [0, 0, 1, 3]
  )


def test_weights_of_all_pairs_of_tokens_never_exist():
  q, k, v, mask = inputs(2, 1024)
  step = jax.jit(lambda *given: results("chunked", *given)).lower(q, k, v, mask)
  wide = [line for line in step.as_text().splitlines() if "1024x1024" in line]
  assert not wide, wide[:3]


def test_chunked_computes_in_the_type_that_it_is_given(small_chunks):
  *qkv, mask = inputs(2, 20)
  want = results("xla", *qkv, mask)["out"]
  got = results("chunked", *(x.astype("bfloat16") for x in qkv), mask)["out"]
  assert got.dtype == "bfloat16"
  np.testing.assert_allclose(got.astype("float32"), want, atol=0.03)
