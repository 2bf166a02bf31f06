"""Held-out questions of the run's data, compared with truth.

The embedded world's truth is exact: a short answer is right or wrong, and of a
description it is known which statements nothing in the video supports, the rate of
hallucination (Rohrbach et al. 2018, 1809.02156) over all that is stated. Of a user's
own videos only a reference answer is known, which an answer meets word by word or not.
The judge that labelled the preferences compares the policies, too: where it sees more
progress than truth does, the policy has learned to please it.
"""

from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import UserError, check_choices
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world_truth
from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkModel,
  BenchmarkQuestion,
  BenchmarkReply,
  CaseJudge,
  ScoredCase,
)
from vlmrlaif_jax.evals.summary import HELD_OUT
from vlmrlaif_jax.feedback.pairwise_judge import AnswerPair, PairOutcome, compute_win

SOURCE = protocol.Source(
  "held-out questions", "the section data", "  data.benchmark or the embedded world"
)
SETTINGS = {
  "judge": True,  # Whether the first of two policies compares their answers.
  # Counts, such as (4, 16), of answers of the last policy that DPO has trained: the
  # best of so many is measured as well.
  "best_of": (),
  "bon_reward": ("mean",),  # Rewards by which: per token, or of whole answers: "total".
  "bon_temperature": 1.0,
}


def check(config: ConfigDict) -> None:
  """Checks the settings of the best of several answers.

  Raises:
    ValueError: a setting has a wrong value.
  """
  check_choices(config, {"bon_reward": ("mean", "total")})
  if not all(isinstance(count, int) and count > 0 for count in config.best_of):
    raise ValueError(f"best_of must hold counts above 0, not {config.best_of}")


def run(
  items: Sequence[Example], model: BenchmarkModel, judge: CaseJudge, config: ConfigDict
) -> list[ScoredCase]:
  """Returns measures by truth; the judge is not asked.

  Raises:
    UserError: no question was answered.
  """
  questions = [BenchmarkQuestion(e["id"], e["video"], e["question"]) for e in items]
  replies = model.generate_replies(questions)
  there = [(q, r.text) for q, r in zip(questions, replies, strict=True) if r]
  if not there:
    raise UserError(
      f"none of the {len(items)} held-out questions is answered: raise "
      "--config.evaluate.prompt_len, the tokens of a question and its video (0: "
      "--config.data.prompt_len)"
    )
  rewards: dict[str, float] = {}
  if model.compute_rewards:
    asked, texts = zip(*there, strict=True)
    made = model.compute_rewards(asked, texts)
    rewards = {q.id: float(x) for q, x in zip(asked, made, strict=True)}
  return [
    score_answer(question, example, reply, rewards.get(question.id))
    for question, example, reply in zip(questions, items, replies, strict=True)
  ]


def score_answer(
  asked: BenchmarkQuestion,
  example: Example,
  reply: BenchmarkReply | None,
  reward: float | None,
) -> ScoredCase:
  """Returns what an answer adds to each measure.

  Args:
    asked: the question.
    example: that it is of, with its truth or a reference answer.
    reply: the answer, None if there is none.
    reward: the reward model's score of it, None if there is none.
  """
  right = example.get("truth", {}).get("answer", example["answer"])
  if reply is None:
    return protocol.make_rule_case(asked, None, right)
  verdict = world_truth.judge_answer(example, reply.text)
  tallies: dict[str, tuple[float | int, float | int]] = {}
  if verdict.correct is not None:
    tallies["accuracy"] = tallies[f"{verdict.kind}.accuracy"] = (verdict.correct, 1)
  if verdict.recall is not None:
    tallies["hallucination"] = (len(verdict.unsupported), verdict.claims)
    tallies["recall"] = (verdict.recall, 1)
  tallies |= {"words": (len(reply.text.split()), 1), "stopped": (reply.stopped, 1)}
  if reward is not None:
    tallies["reward"] = (reward, 1)
  details = {
    "kind": verdict.kind,
    "question": example["question"],
    "text": reply.text,
    "stopped": reply.stopped,
    "correct": verdict.correct,
    "unsupported": verdict.unsupported,
  }
  return protocol.make_ratio_case(asked, tallies, right)._replace(details=details)


def compare_policies(
  items: Sequence[Example],
  rows: tuple[list[ScoredCase], list[ScoredCase]],
  judge_pairs: Callable[[list[AnswerPair]], list[PairOutcome]],
) -> tuple[list[ScoredCase], list[ScoredCase]]:
  """Adds how often a judge prefers each policy, and how far that is from truth.

  A win is 1, a loss 0, neither 1/2: "judge_score". "truth_score" is the same by truth,
  where it is known. "judge_drift", of the second policy alone, is the judge's less
  truth's. Answers that are equal, and verdicts that cannot be told, are left out.
  """
  before, after = (list(side) for side in rows)
  unlike = {
    i: (first.details["text"], second.details["text"])
    for i, (first, second) in enumerate(zip(before, after, strict=True))
    if first.details
    and second.details
    and first.details["text"] != second.details["text"]
  }
  asked = [
    AnswerPair(items[i]["id"], items[i]["video"], items[i]["question"], *texts)
    for i, texts in unlike.items()
  ]
  outcomes = zip(unlike.items(), judge_pairs(asked), strict=True)
  for (i, texts), outcome in outcomes:
    won, true = compute_win(outcome), judge_by_truth(items[i], texts)
    found = {}
    if won is not None:
      found["judge_score"] = won
      if true is not None:
        found |= {"truth_score": true, "judge_drift": won - true}
    turned = {name: 1 - x for name, x in found.items() if name != "judge_drift"}
    for side, values in ((before, turned), (after, found)):
      side[i] = side[i]._replace(
        values=side[i].values | values,
        details={**side[i].details, "judgement": outcome.name},
      )
  return before, after


def judge_by_truth(example: Example, texts: tuple[str, str]) -> float | None:
  """As `win`, by the mistakes of each answer; None where truth is not known."""
  first, second = (world_truth.count_answer_mistakes(example, text) for text in texts)
  if first is None or second is None:
    return None
  return 0.5 + 0.5 * float(np.sign(first - second))


BENCHMARKS = (
  protocol.Benchmark(
    HELD_OUT,
    SOURCE,
    None,
    run,
    settings=SETTINGS,
    scoring="rules",
    shares=("hallucination", "recall", "stopped"),
    check=check,
    compare=compare_policies,
  ),
)
