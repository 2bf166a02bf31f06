"""Correlates judges' scores of answers with human scores or the ground truth.

Generative RLHF-V (2505.18531), table 1: a generative reward model compares answers in
pairs. The "grouped" score of an answer is the mean over all other answers to the
question. The "single" score is from one other answer, drawn at random. A scalar reward
model scores each answer alone.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import numpy as np

from vlmrlaif_jax.core import distributed, resumable
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data.records import (
  Example,
  SkippedRecord,
  format_skipped_records,
)
from vlmrlaif_jax.evals import judge_agreement
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.evals.judge_agreement import AnswerGroup
from vlmrlaif_jax.evals.summary import PLAIN, format_row
from vlmrlaif_jax.feedback import generative_rm
from vlmrlaif_jax.feedback.pairwise_judge import AskFn, ask_unique, make_query_key
from vlmrlaif_jax.runtime import answering, resume_policy, scoring
from vlmrlaif_jax.runtime.answering import Answerer
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.video import encode_videos

# Scores groups: groups -> a row with "single" and "grouped" scores; None if missing.
GroupScorer: TypeAlias = Callable[[Sequence[AnswerGroup]], list[JsonRow]]
# Whether an answer is compared with one other answer only.
GROUPINGS = {"single": True, "grouped": False}


def answer_questions(
  run: Run,
  variables: Params,
  examples: Sequence[Example],
  folder: pathlib.Path,
  log: StageLog,
) -> list[AnswerGroup]:
  """Answers the questions with a known ground truth. The examples are of one source.

  Truncated answers are left out. The score of an answer is minus its mistakes.
  """
  config = run.config.judges
  known = [e for e in examples if "scene" in e.get("truth", {})]
  if not known:
    return []
  sampling = answering.read_sampling_settings(run.config, "judges", config.samples)
  source = known[0]["source"]
  answerer = Answerer(run, variables, sampling, folder / f"answers_{source}.jsonl")
  replies = answerer.generate_replies(
    answering.make_queries(known),
    lambda done: log.log_progress(done, {}, f"of {source}"),
  )
  groups = []
  for example, samples in zip(known, replies, strict=True):
    texts = tuple(reply.text for reply in samples if reply.stopped and reply.text)
    # No count is None, because the ground truth is known.
    mistakes = cast(
      list[int], [truth.count_answer_mistakes(example, text) for text in texts]
    )
    identity = example["id"], example["video"], example["question"]
    groups.append(AnswerGroup(*identity, texts, tuple(-count for count in mistakes)))
  return groups


def make_answer_groups(
  run: Run, answers: Sequence[AnswerGroup], log: StageLog
) -> tuple[Run, list[AnswerGroup]]:
  """Returns the answers with scores that judges are compared with.

  These are the policy's `answers`, unless config.judges.scores names a file.

  Returns:
    The run with the features of the videos, and the groups.
  """
  config = run.config.judges
  if not config.scores:
    distinct = [each for each in answers if len({*each.texts}) > 1]
    return run, distinct[: config.groups]
  path = pathlib.Path(config.scores)
  problems: list[SkippedRecord] = []
  groups = judge_agreement.load_groups(path, config.videos, problems)
  if problems:
    total = sum(len(group.texts) for group in groups) + len(problems)
    log.print_note(f"judges: {format_skipped_records(problems, total=total)}")
  run = encode_videos(run, [group.video for group in groups], log.print_note)
  readable = [group for group in groups if run.features.has(group.video)]
  if len(readable) < len(groups):
    log.print_note(
      f"judges: {len(groups) - len(readable)} of {len(groups)} videos cannot be read"
    )
  return run, readable


def measure_correlations(
  run: Run,
  judges: dict[str, tuple[GroupScorer, Params]],
  groups: Sequence[AnswerGroup],
  folder: pathlib.Path,
  log: StageLog,
) -> JsonRow:
  """Computes the correlations of each judge and writes scores.json.

  `judges` has the scorer and the variables of each judge. Without groups, nothing is
  measured.

  Returns:
    The content of scores.json.
  """
  if not groups:
    return {"judges": {}}
  config, correlations = run.config.judges, {}
  server = resume_policy.select_fixed_settings(config.endpoint, "judges.endpoint")
  settings = (config.prompt_len, config.max_new, config.both_orders)
  facts = (run.config.model.prompts, *settings, run.config.seed)
  resampling = Resampling(seed=run.config.seed, resamples=config.resamples)
  for name, (score, variables) in judges.items():

    def make_rows(block: range, score: GroupScorer = score) -> list[JsonRow]:
      return score([groups[i] for i in block])

    log.print_note(f"judges: {name} scores the answers to {len(groups)} questions")
    rows = resumable.load_or_compute(
      folder / f"scored_{name}.jsonl",
      run.watch.wrap_blocks(make_rows),
      count=len(groups),
      batch=config.batch,
      # The judge without variables is the server.
      fingerprint=resumable.compute_fingerprint(
        variables, facts, {} if variables else server, list(groups)
      ),
    )
    correlations[name] = {
      way: judge_agreement.correlate_with_people(
        groups, [row[way] for row in rows], resampling
      )
      for way in GROUPINGS
      if way in rows[0]
    }
  results = {
    "groups": len(groups),
    "answers": sum(len(group.texts) for group in groups),
    "judges": correlations,
  }
  distributed.on_process_zero(lambda: write_json(folder / "scores.json", results))
  table = [
    {"answers": str(results["answers"]), "judge": name}
    | format_row({way: stats.get(way) or {} for way in GROUPINGS}, PLAIN)
    for name, stats in correlations.items()
  ]
  log.print_table("Judges: correlation with reference scores [95 % interval]", table)
  return results


def make_pairwise_scorer(
  run: Run, ask: AskFn, style: generative_rm.JudgeStyle
) -> GroupScorer:
  """Returns a scorer that compares all pairs of answers to a question."""

  def score(groups):
    known: dict[tuple, str | None] = {}  # Both groupings share queries.

    def ask_once(queries):
      known.update(
        ask_unique(ask, [q for q in queries if make_query_key(q) not in known])
      )
      return [known[make_query_key(query)] for query in queries]

    examples = [group.to_example() for group in groups]
    # Groups are padded with empty answers, which are not compared.
    max_answers = max(len(group.texts) for group in groups)
    texts = [[*g.texts, *[""] * (max_answers - len(g.texts))] for g in groups]
    rows: list[JsonRow] = [{"id": group.id} for group in groups]
    for way, one_opponent in reversed(GROUPINGS.items()):
      compare = generative_rm.compare_in_pairs(
        ask_once,
        style,
        both_orders=run.config.judges.both_orders,
        one_opponent=one_opponent,
      )
      comparison = compare(examples, texts)
      scores = np.where(comparison.valid, comparison.scores, None).tolist()
      for row, group, each in zip(rows, groups, scores, strict=True):
        row[way] = each[: len(group.texts)]
    return rows

  return score


def make_reward_group_scorer(run: Run, variables: Params) -> GroupScorer:
  """Returns a scorer that scores each answer alone with the reward model."""

  def score(groups):
    flat = [(group, text) for group in groups for text in group.texts]
    examples = [group.to_example() for group, _ in flat]
    texts = [text for _, text in flat]
    scores = iter(scoring.score_texts(run, variables, examples, texts).tolist())
    return [
      {"id": group.id, "single": [next(scores) for _ in group.texts]}
      for group in groups
    ]

  return score
