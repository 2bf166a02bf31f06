"""How alike texts are: what retrieval and action recognition go by.

VLM-Eval (Li et al. 2023, 2311.11865) compares what a policy says of a video with
captions, or with names of actions, by the cosine of CLIP's text features. No CLIP has
learned the embedded world's descriptions, but what they state can be read exactly.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlmrlaif_jax.data.world import language


class Similarity(NamedTuple):
  """What tells how alike texts are."""

  name: str
  # All that it depends on beside the texts; "version": of a checkpoint its weights'
  # fingerprint.
  facts: Mapping[str, Any]
  # (what a policy says of each video, what that is compared with) -> higher is closer.
  compare: Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, "said others"]]


def is_within(
  scores: Float[np.ndarray, "rows others"], right: Int[np.ndarray, " rows"], k: int
) -> Float[np.ndarray, " rows"]:
  """Returns whether the right one is among the k that score highest in its row.

  Where it ties with others it is the chance that it is, all orders being as likely:
  right in [3, 2, 2, 1] is within the first 2 half of the time.
  """
  own = scores[np.arange(len(scores)), right][:, None]
  above, same = (scores > own).sum(axis=1), (scores == own).sum(axis=1)
  return np.clip((k - above) / same, 0.0, 1.0)


def count_hits(
  scores: Float[np.ndarray, "rows others"], right: Int[np.ndarray, " rows"], name: str
) -> list[dict[str, float]]:
  """Returns, by NAME1 and NAME5, `within` the first 1 and 5 for each row."""
  found = {f"{name}{k}": is_within(scores, right, k).tolist() for k in (1, 5)}
  return [
    dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)
  ]


# Of the embedded world.

_AND = re.compile(r" and |\.")


def split_into_statements(text: str) -> frozenset[tuple[str, ...]]:
  """What a text of the world states, of its objects and of what is done by any.

  "The small red ring moves left." states that there is a red object, its size, shape
  and motion, and that there is something that moves left, as "moves left and stays
  still", which is the name of an action, does. What is of no known form states nothing
  that another text could, but itself.
  """
  parts = [*filter(None, (part.strip().lower() for part in _AND.split(text)))]
  if all(part in language.MOVES for part in parts):
    return frozenset(("motion", part) for part in parts)
  claims = language.split_claims(text)
  return frozenset(claims) | {c[1:] for c in claims if c[1] == "motion"}


def compare_statements(
  said: Sequence[str], others: Sequence[str]
) -> Float[np.ndarray, "said others"]:
  """The cosine of two texts' statements: |A and B| / sqrt(|A| |B|)."""
  rows, columns = (
    [split_into_statements(text) for text in texts] for texts in (said, others)
  )
  shared = np.array([[len(a & b) for b in columns] for a in rows], float)
  shared = shared.reshape(len(rows), len(columns))
  sizes = np.outer([len(a) for a in rows], [len(b) for b in columns])
  return shared / np.sqrt(np.maximum(sizes, 1))


STATEMENTS = Similarity("statements", {"version": "1"}, compare_statements)
