"""What judges score answers, held against what people or truth score them.

Generative RLHF-V (2505.18531), table 1: a generative reward model compares answers two
at a time. "grouped": an answer's score is the mean over all others to the question;
"single": over one other, drawn. A scalar reward model scores each answer by itself.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from vlmrlaif_jax.core import distributed, resumable
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import judge_agreement
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.evals.judge_agreement import Group
from vlmrlaif_jax.evals.summary import PLAIN, format_row
from vlmrlaif_jax.feedback import generative_rm
from vlmrlaif_jax.feedback.pairwise_judge import Ask, ask_once, same
from vlmrlaif_jax.runtime import answering, resume_policy, scoring
from vlmrlaif_jax.runtime.answering import Answerer
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.video import with_features

Row: TypeAlias = dict[str, Any]
# The scores of each group's answers by way, "single" or "grouped"; None for none.
Scorer: TypeAlias = Callable[[Sequence[Group]], list[Row]]
WAYS = {"single": True, "grouped": False}  # Whether an answer meets one other alone.


def answered(
  run: Run,
  variables: Params,
  examples: Sequence[Example],
  folder: pathlib.Path,
  log: Log,
) -> list[Group]:
  """What a policy answers to each question of which truth is known.

  Answers that were cut are left out. Each is scored as many less than 0 as it has
  mistakes.
  """
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
    texts = tuple(reply.text for reply in each if reply.stopped and reply.text)
    # Truth is known of each, so that none is None.
    wrong = cast(list[int], [truth.mistakes(example, text) for text in texts])
    asked = example["id"], example["video"], example["question"]
    found.append(Group(*asked, texts, tuple(-count for count in wrong)))
  return found


def groups_of(run: Run, answers: Sequence[Group], log: Log) -> tuple[Run, list[Group]]:
  """Answers with scores to hold judges against, those of config.judges.scores or else
  the policy's; and the run with the features of their videos.
  """
  config = run.config.judges
  if not config.scores:
    several = [each for each in answers if len({*each.texts}) > 1]
    return run, several[: config.groups]
  groups = judge_agreement.load(pathlib.Path(config.scores), config.videos)
  run = with_features(run, [group.video for group in groups], log.note)
  seen = [group for group in groups if run.features.has(group.video)]
  if len(seen) < len(groups):
    log.note(f"judges: {len(groups) - len(seen)} of {len(groups)} videos are not read")
  return run, seen


def run_part(
  run: Run,
  judges: dict[str, tuple[Scorer, Params]],
  groups: Sequence[Group],
  folder: pathlib.Path,
  log: Log,
) -> Row:
  """The correlations of each judge, if there are groups; writes scores.json.

  Args:
    judges: each with the variables that it depends on.
  """
  if not groups:
    return {"judges": {}}
  config, found = run.config.judges, {}
  facts = (run.config.model.prompts, config.prompt_len, config.max_new,
           config.both_orders, resume_policy.fixed(config.endpoint, "judges.endpoint"),
           run.config.seed)  # fmt: skip
  how = Resampling(seed=run.config.seed, resamples=config.resamples)
  for name, (score, variables) in judges.items():

    def make(block: range, score: Scorer = score) -> list[Row]:
      return score([groups[i] for i in block])

    log.note(f"judges: answers to {len(groups)} questions to {name}")
    rows = resumable.kept_rows(
      folder / f"scored_{name}.jsonl",
      run.watch.blocks(make),
      count=len(groups),
      batch=config.batch,
      fingerprint=resumable.fingerprint(variables, facts, list(groups)),
    )
    found[name] = {
      way: judge_agreement.pearson(groups, [row[way] for row in rows], how)
      for way in WAYS
      if way in rows[0]
    }
  told = {
    "groups": len(groups),
    "answers": sum(len(group.texts) for group in groups),
    "judges": found,
  }
  distributed.once(lambda: write_json(folder / "scores.json", told))
  table = [
    {"answers": str(told["answers"]), "judge": name}
    | format_row({way: stats.get(way) or {} for way in WAYS}, PLAIN)
    for name, stats in found.items()
  ]
  log.table("Judges: correlation with the right scores [95 % interval]", table)
  return told


def by_comparing(run: Run, ask: Ask, style: generative_rm.Style) -> Scorer:
  """A judge that is asked about every two answers to a question."""

  def score(groups):
    known: dict[tuple, str | None] = {}  # Both ways ask some of the same.

    def once(queries):
      known.update(ask_once(ask, [q for q in queries if same(q) not in known]))
      return [known[same(query)] for query in queries]

    examples = [group.example() for group in groups]
    # As many answers each: those that are empty are not compared.
    longest = max(len(group.texts) for group in groups)
    texts = [[*g.texts, *[""] * (longest - len(g.texts))] for g in groups]
    rows: list[Row] = [{"id": group.id} for group in groups]
    for way, one_opponent in reversed(WAYS.items()):
      compare = generative_rm.by_comparison(
        once,
        style,
        both_orders=run.config.judges.both_orders,
        one_opponent=one_opponent,
      )
      made = compare(examples, texts)
      scores = np.where(made.valid, made.scores, None).tolist()
      for row, group, each in zip(rows, groups, scores, strict=True):
        row[way] = each[: len(group.texts)]
    return rows

  return score


def by_reward(run: Run, variables: Params) -> Scorer:
  """A reward model, which scores each answer alone."""

  def score(groups):
    flat = [(group, text) for group in groups for text in group.texts]
    examples = [group.example() for group, _ in flat]
    texts = [text for _, text in flat]
    made = iter(scoring.score_texts(run, variables, examples, texts).tolist())
    return [
      {"id": group.id, "single": [next(made) for _ in group.texts]} for group in groups
    ]

  return score
