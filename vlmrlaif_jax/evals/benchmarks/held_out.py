"""Scores held-out questions of the run's data by truth.

The embedded world's truth is exact. A short answer is right or wrong. Each statement of
a description is true or unsupported, and the hallucination rate is the unsupported
share of all statements (Rohrbach et al. 2018, 1809.02156). The headline is the mean
over kinds of questions, with F1 of statements for descriptions.

A user's own videos have only a reference answer, which an answer matches or not; see
feedback/answers.py.

The judge that labeled the preferences also compares two policies. If it finds more
progress than truth does, the policy exploits the judge.
"""

import collections
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import UserError, check_choices
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.templates import show_media
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
from vlmrlaif_jax.feedback import answers
from vlmrlaif_jax.feedback.pairwise_judge import (
  JUDGED,
  AnswerPair,
  PairOutcome,
  compute_win,
)

SOURCE = protocol.Source(
  "held-out questions", "the section data", "  data.benchmark or the embedded world"
)
MEAN_OF_KINDS = "mean_of_kinds"
SETTINGS = {
  "judge": True,  # Compares the answers of two policies by a judge.
  # Numbers of answers to sample, such as (4, 16), for best-of-n with the last policy.
  "best_of": (),
  # Rewards that select among the same answers: "mean", "total", "logp" or "ref_logp"
  # (see best_of_n.py), or "reward" for those of the section `reward`.
  "bon_reward": ("mean",),
  # Sampling of best-of-n. A reward is less reliable for answers that the reference
  # hardly ever gives.
  "bon_temperature": 0.7,
  "bon_top_p": 0.9,
}


def check(config: ConfigDict) -> None:
  """Checks the settings of best-of-n.

  Raises:
    ValueError: A setting has a wrong value.
  """
  check_choices(config, {"bon_reward": ("mean", "total", "logp", "ref_logp", "reward")})
  if not (config.bon_temperature > 0 and 0 < config.bon_top_p <= 1):
    raise ValueError(
      "bon_temperature must be above 0 and bon_top_p from 0 to 1, not "
      f"{config.bon_temperature} and {config.bon_top_p}"
    )
  if not all(isinstance(count, int) and count > 0 for count in config.best_of):
    raise ValueError(f"best_of must contain integers above 0, got {config.best_of}")


def run(
  items: Sequence[Example], model: BenchmarkModel, judge: CaseJudge, config: ConfigDict
) -> list[ScoredCase]:
  """Scores the answers by truth; the judge receives nothing.

  Raises:
    UserError: No question was answered.
  """
  questions = [BenchmarkQuestion(e["id"], e["video"], e["question"]) for e in items]
  replies = model.generate_replies(questions)
  answered = [(e, r) for e, r in zip(items, replies, strict=True) if r]
  if not answered:
    raise UserError(
      f"none of the {len(items)} held-out questions has an answer: raise "
      "--config.evaluate.prompt_len, the tokens of a question and its video (0 uses "
      "--config.data.prompt_len)"
    )
  rewards: dict[str, float] = {}
  if model.compute_rewards:
    scores = model.compute_rewards(*zip(*answered, strict=True))
    rewards = {
      example["id"]: float(score)
      for (example, _), score in zip(answered, scores, strict=True)
      if score is not None
    }
  return weigh_kinds(
    [
      score_answer(question, example, reply, rewards.get(question.id))
      for question, example, reply in zip(questions, items, replies, strict=True)
    ]
  )


def weigh_kinds(cases: Sequence[ScoredCase]) -> list[ScoredCase]:
  """Adds the mean over kinds of questions: accuracies, and F1 of descriptions.

  Each kind has the same weight, so that no kind decides the result by its frequency. It
  is added if there are several kinds.
  """
  scores = {
    i: (name, value)
    for i, case in enumerate(cases)
    for name, value in case.values.items()
    if name.endswith((".accuracy", ".f1"))
  }
  counts = collections.Counter(name for name, _ in scores.values())
  if len(counts) < 2:
    return [*cases]
  weighed = [*cases]
  for i, (name, value) in scores.items():
    case = cases[i]
    weights = {**case.weights, MEAN_OF_KINDS: 1 / counts[name]}
    values = {**case.values, MEAN_OF_KINDS: value}
    weighed[i] = case._replace(values=values, weights=weights)
  return weighed


def score_answer(
  question: BenchmarkQuestion,
  example: Example,
  reply: BenchmarkReply | None,
  reward: float | None,
) -> ScoredCase:
  """Returns an answer's scored case.

  Args:
    question: The question.
    example: Example of the question, with its truth or a reference answer.
    reply: The answer, None for a missing answer.
    reward: The score by the section `reward`, None for none.
  """
  right = example.get("truth", {}).get("answer", example["answer"])
  if reply is None:
    return protocol.make_rule_case(question, None, right)
  verdict = world_truth.judge_answer(example, reply.text)
  tallies: dict[str, tuple[float | int, float | int]] = {}
  if verdict.correct is not None:
    tallies["accuracy"] = tallies[f"{verdict.kind}.accuracy"] = (verdict.correct, 1)
  if verdict.kind == world_truth.REFERENCE and right:
    tallies["f1"] = (answers.compute_f1(reply.text, right), 1)
  if verdict.recall is not None:
    tallies["hallucination"] = (len(verdict.unsupported), verdict.claims)
    tallies["recall"] = (verdict.recall, 1)
    tallies["description.f1"] = (verdict.compute_f1(), 1)
  tallies |= {"words": (len(reply.text.split()), 1), "stopped": (reply.stopped, 1)}
  if reward is not None:
    tallies["reward"] = (reward, 1)
  details = {
    "kind": verdict.kind,
    "question": show_media(example["question"]),
    "text": reply.text,
    "stopped": reply.stopped,
    "correct": verdict.correct,
    "unsupported": verdict.unsupported,
  }
  return protocol.make_ratio_case(question, tallies, right)._replace(details=details)


def compare_policies(
  items: Sequence[Example],
  rows: tuple[list[ScoredCase], list[ScoredCase]],
  judge_pairs: Callable[[list[AnswerPair]], list[PairOutcome]],
) -> tuple[list[ScoredCase], list[ScoredCase]]:
  """Adds how often a judge prefers each policy, and how far that is from truth.

  A win is 1, a loss 0, a tie 0.5. Equal answers and unreadable verdicts are left out.

  Args:
    items: The examples.
    rows: Cases of the first and of the second policy, one per example.
    judge_pairs: Returns the outcome of each pair of answers.

  Returns:
    The cases of both policies with "judge_score", and with "truth_score" if truth is
    known. The second policy's cases also have "judge_drift", which is judge_score minus
    truth_score, and "judge_unread", the share of the judged pairs without a verdict.
  """
  before, after = (list(side) for side in rows)
  different = {
    i: (first.details["text"], second.details["text"])
    for i, (first, second) in enumerate(zip(before, after, strict=True))
    if first.details
    and second.details
    and first.details["text"] != second.details["text"]
  }
  pairs = [
    AnswerPair(items[i]["id"], items[i]["video"], items[i]["question"], *texts)
    for i, texts in different.items()
  ]
  outcomes = zip(different.items(), judge_pairs(pairs), strict=True)
  for (i, texts), outcome in outcomes:
    win, true_win = compute_win(outcome), judge_by_truth(items[i], texts)
    added = {}
    if outcome.name in JUDGED:
      added["judge_unread"] = float(win is None)
    if win is not None:
      added["judge_score"] = win
      if true_win is not None:
        added |= {"truth_score": true_win, "judge_drift": win - true_win}
    opposite = {name: 1 - x for name, x in added.items() if name.endswith("_score")}
    for side, values in ((before, opposite), (after, added)):
      side[i] = side[i]._replace(
        values=side[i].values | values,
        details={**side[i].details, "judgement": outcome.name},
      )
  return before, after


def judge_by_truth(example: Example, texts: tuple[str, str]) -> float | None:
  """Returns the second answer's win by mistakes: 1, 0.5 or 0; None without truth."""
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
    shares=(MEAN_OF_KINDS, "f1", "hallucination", "recall", "stopped", "judge_unread"),
    check=check,
    compare=compare_policies,
  ),
)
