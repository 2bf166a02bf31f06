"""How alike texts are, worked out by hand."""

import numpy as np
import pytest

from vlmrlaif_jax.evals import text_similarity

RING = "The small red ring moves left."  # 4 statements, and that something moves left.
CROSS = "The large blue cross stays still, then vanishes."  # 5, and that it stays.


@pytest.mark.parametrize(
  ("scores", "first", "chance"),
  [
    ([1, 3, 2], 1, 0.0),
    ([1, 3, 2], 2, 0.0),
    ([1, 3, 2], 3, 1.0),
    ([3, 3, 2], 1, 0.5),
    ([2, 3, 2, 2], 2, 1 / 3),
    ([2, 3, 2, 2], 5, 1.0),
  ],
)
def test_ties_count_by_chance(scores, first, chance):
  found = text_similarity.is_within(np.array([scores], float), np.array([0]), first)
  np.testing.assert_allclose(found, [chance])


def test_likeness_is_the_cosine_of_statements():
  other = "The small red ring moves up."  # It shares 3 of 5: exists, size, shape.
  found = text_similarity.compare_statements(
    [RING, f"{RING} {CROSS}"], [RING, other, CROSS]
  )
  np.testing.assert_allclose(
    found, [[1, 3 / 5, 0], [5 / 55**0.5, 3 / 55**0.5, 6 / 66**0.5]]
  )


def test_order_of_sentences_does_not_matter():
  [[found]] = text_similarity.compare_statements(
    [f"{RING} {CROSS}"], [f"{CROSS} {RING}"]
  )
  assert found == pytest.approx(1)


def test_an_action_is_what_is_done_by_any():
  named = "moves left and stays still"
  assert text_similarity.split_into_statements(named) == {("motion", "moves left"),
                                        ("motion", "stays still")}  # fmt: skip
  found = text_similarity.compare_statements(
    [f"{RING} {CROSS}"], [named, "moves left", "moves up"]
  )
  assert np.argmax(found) == 0 and found[0, 1] > found[0, 2] == 0


@pytest.mark.parametrize("text", ["", "Blue rain."])
def test_what_states_nothing_known_is_like_nothing(text):
  assert text_similarity.compare_statements([text], [RING]) == 0
