"""What the judge that labelled the preferences says of two policies' answers."""

from collections.abc import Mapping, Sequence

import numpy as np

from vlmrlaif_jax.data.prompts import Prompts
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world_truth
from vlmrlaif_jax.feedback.pairwise_judge import Ask, Judgement, Pair, judge_pairs, win

Texts = tuple[list[str], list[str]]  # What two policies said, question by question.


def unlike(said: Texts, *, share: float, seed: int) -> list[int]:
  """The numbers of the questions that are answered differently; a share of them."""
  rows = [i for i, (first, second) in enumerate(zip(*said, strict=True))
          if first != second]  # fmt: skip
  drawn = np.random.default_rng([seed, 11]).permutation(len(rows))
  return sorted(rows[i] for i in drawn[: round(len(rows) * share)])


def judge(
  rows: Sequence[int],
  examples: Sequence[Example],
  said: Texts,
  narratives: Sequence[str],
  ask: Ask,
  prompts: Prompts,
) -> dict[int, Judgement]:
  """What becomes of the answers to each of the questions, by its number.

  Args:
    rows: numbers of the questions.
    narratives: what the judge is told of the video of each of these questions.
    ask: see feedback.judge.judge_pairs.
  """
  pairs = []
  for i, narrative in zip(rows, narratives, strict=True):
    about = (examples[i]["id"], examples[i]["video"], examples[i]["question"])
    pairs.append(Pair(*about, said[0][i], said[1][i], narrative))
  return dict(zip(rows, judge_pairs(pairs, ask, prompts), strict=True))


def outcomes(
  judgements: Mapping[int, Judgement], examples: Sequence[Example], said: Texts
) -> tuple[dict[int, float], dict[int, float]]:
  """(how the judge, how truth compares the answers), by number of the question.

  1 if the second answer is better, 0 if the first, 1/2 if neither. A judgement that
  cannot be told is left out, and so is a question whose truth is not known.
  """
  wins, truths = {}, {}
  for i, judgement in judgements.items():
    won = win(judgement.outcome)
    first, second = (world_truth.mistakes(examples[i], texts[i]) for texts in said)
    if won is not None:
      wins[i] = won
      if first is not None and second is not None:
        truths[i] = 0.5 + 0.5 * float(np.sign(first - second))
  return wins, truths
