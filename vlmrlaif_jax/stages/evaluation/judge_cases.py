"""What the stage `judges` measures judges on: pairs, and answers with right scores."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple, cast

from vlmrlaif_jax.core.jsonl import numbered_rows
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import records
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import mllm_judge, preference_accuracy
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.evals.mllm_judge import Group
from vlmrlaif_jax.runtime import answering, scoring
from vlmrlaif_jax.runtime.answering import Answerer
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.video import with_features
from vlmrlaif_jax.stages.training.generative_rm import Pairs


class Answered(NamedTuple):
  """A question of which truth is known, and what the policy said to it."""

  example: Example
  texts: list[str]
  wrong: list[int]  # Mistakes of each.


def answered(
  run: Run,
  variables: Params,
  examples: Sequence[Example],
  folder: pathlib.Path,
  log: Log,
) -> list[Answered]:
  """What a policy answers to each question; answers that were cut are left out."""
  config = run.config.judges
  known = [e for e in examples if "scene" in e.get("truth", {})]
  if not known:
    return []
  sampling = answering.sampling_of(run.config, "judges", config.samples)
  source = known[0]["source"]
  answerer = Answerer(run, variables, sampling, folder / f"answers_{source}.jsonl")
  replies = answerer.replies(
    answering.questions(known), lambda done: log.progress(done, {}, f"of {source}")
  )
  found = []
  for example, each in zip(known, replies, strict=True):
    texts = [reply.text for reply in each if reply.stopped and reply.text]
    # Truth is known of each, so that none is None.
    wrong = cast(list[int], [truth.mistakes(example, text) for text in texts])
    found.append(Answered(example, texts, wrong))
  return found


def pairs_of(answers: Sequence[Answered]) -> Pairs:
  """Two answers to each question, where truth tells which is better."""
  pairs = [preference_accuracy.pair_of(*each) for each in answers]
  return [pair for pair in pairs if pair is not None]


def of_file(run: Run, log: Log) -> tuple[Run, Pairs]:
  """The pairs of config.judges.pairs that can be judged, and the run with features of
  their videos.
  """
  config = run.config.judges
  if not config.pairs:
    return run, []
  path = pathlib.Path(config.pairs)
  problems: list[records.Problem] = []
  first = next(iter(numbered_rows(path)), ("", {}))[1]
  if "answer1" in first:
    pairs = mllm_judge.load_pairs(path, config.videos)
  else:
    pairs, problems = records.read_preferences(path, videos=config.videos or None)
  run = with_features(run, [pair["video"] for pair in pairs], log.note)
  total = len(pairs) + len(problems)
  pairs, more = scoring.scorable(run, pairs)
  if problems or more:
    log.note(records.report_problems([*problems, *more], total=total))
  return run, pairs


def groups_of(
  run: Run, answers: Sequence[Answered], log: Log
) -> tuple[Run, list[Group]]:
  """Answers with scores to hold judges against, those of config.judges.scores or the
  policy's with as many less than 0 as it has mistakes; and the run with the features
  of their videos.
  """
  config = run.config.judges
  if not config.scores:
    several = [each for each in answers if len({*each.texts}) > 1]
    made = [
      Group(e["id"], e["video"], e["question"], tuple(texts), tuple(-n for n in wrong))
      for e, texts, wrong in several[: config.groups]
    ]
    return run, made
  groups = mllm_judge.load(pathlib.Path(config.scores), config.videos)
  run = with_features(run, [group.video for group in groups], log.note)
  seen = [group for group in groups if run.features.has(group.video)]
  if len(seen) < len(groups):
    log.note(f"judges: {len(groups) - len(seen)} of {len(groups)} videos are not read")
  return run, seen
