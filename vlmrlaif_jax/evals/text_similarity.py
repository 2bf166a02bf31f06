"""Measures text similarity, for retrieval and action recognition.

VLM-Eval (Li et al. 2023, 2311.11865) compares a policy's description of a video with
captions, or with names of actions, by the cosine of CLIP's text features. CLIP is not
trained on the embedded world's descriptions, but their statements can be parsed
exactly.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlmrlaif_jax.data.world import language


class Similarity(NamedTuple):
  """A measure of text similarity."""

  name: str
  # Settings that the result depends on. "version" is the fingerprint of a checkpoint's
  # weights.
  facts: Mapping[str, Any]
  # Returns the similarity of each description of a video with each of the other texts;
  # higher is more similar.
  compare: Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, "texts others"]]


def is_within(
  scores: Float[np.ndarray, "rows others"], right: Int[np.ndarray, " rows"], k: int
) -> Float[np.ndarray, " rows"]:
  """Returns whether the right column is among the k highest scores of its row.

  Ties count as the probability over all orders of the tied columns. For example, the
  first 2 in [3, 2, 2, 1] for the right score 2 has the probability 0.5.
  """
  target = scores[np.arange(len(scores)), right][:, None]
  above, same = (scores > target).sum(axis=1), (scores == target).sum(axis=1)
  return np.clip((k - above) / same, 0.0, 1.0)


def count_hits(
  scores: Float[np.ndarray, "rows others"], right: Int[np.ndarray, " rows"], name: str
) -> list[dict[str, float]]:
  """Returns `is_within` for each row, as NAME1 for k = 1 and NAME5 for k = 5."""
  hits = {f"{name}{k}": is_within(scores, right, k).tolist() for k in (1, 5)}
  return [dict(zip(hits, row, strict=True)) for row in zip(*hits.values(), strict=True)]


# Texts of the embedded world.

_AND = re.compile(r" and |\.")


def split_into_statements(text: str) -> frozenset[tuple[str, ...]]:
  """Returns the statements of a text of the world.

  "The small red ring moves left." has five statements: there is a red object, its size,
  its shape, its motion, and that some object moves left. The name of an action, such as
  "moves left and stays still", has statements of the last form. A text of another form
  is a statement that equals no other text's.
  """
  parts = [*filter(None, (part.strip().lower() for part in _AND.split(text)))]
  if all(part in language.MOVES for part in parts):
    return frozenset(("motion", part) for part in parts)
  claims = language.split_claims(text)
  return frozenset(claims) | {c[1:] for c in claims if c[1] == "motion"}


def compare_statements(
  responses: Sequence[str], others: Sequence[str]
) -> Float[np.ndarray, "responses others"]:
  """Returns the cosine of the texts' statements: |A and B| / sqrt(|A| |B|)."""
  rows, columns = (
    [split_into_statements(text) for text in texts] for texts in (responses, others)
  )
  shared = np.array([[len(a & b) for b in columns] for a in rows], float)
  shared = shared.reshape(len(rows), len(columns))
  sizes = np.outer([len(a) for a in rows], [len(b) for b in columns])
  return shared / np.sqrt(np.maximum(sizes, 1))


STATEMENTS = Similarity("statements", {"version": "1"}, compare_statements)
