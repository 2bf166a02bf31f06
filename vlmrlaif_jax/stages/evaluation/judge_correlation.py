"""What judges score answers, held against what people or truth score them.

Generative RLHF-V (2505.18531), table 1: a generative reward model compares answers two
at a time. "grouped": an answer's score is the mean over all others to the question;
"single": over one other, drawn. A scalar reward model scores each answer by itself.
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
from vlmrlaif_jax.data.records import Example
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

# The scores of each group's answers by way, "single" or "grouped"; None for none.
GroupScorer: TypeAlias = Callable[[Sequence[AnswerGroup]], list[JsonRow]]
GROUPINGS = {
  "single": True,
  "grouped": False,
}  # Whether an answer meets one other alone.


def answer_questions(
  run: Run,
  variables: Params,
  examples: Sequence[Example],
  folder: pathlib.Path,
  log: StageLog,
) -> list[AnswerGroup]:
  """What a policy answers to each question of which truth is known.

  Answers that were cut are left out. Each is scored as many less than 0 as it has
  mistakes.
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
  found = []
  for example, each in zip(known, replies, strict=True):
    texts = tuple(reply.text for reply in each if reply.stopped and reply.text)
    # Truth is known of each, so that none is None.
    wrong = cast(
      list[int], [truth.count_answer_mistakes(example, text) for text in texts]
    )
    asked = example["id"], example["video"], example["question"]
    found.append(AnswerGroup(*asked, texts, tuple(-count for count in wrong)))
  return found


def make_answer_groups(
  run: Run, answers: Sequence[AnswerGroup], log: StageLog
) -> tuple[Run, list[AnswerGroup]]:
  """Answers with scores to hold judges against, those of config.judges.scores or else
  the policy's; and the run with the features of their videos.
  """
  config = run.config.judges
  if not config.scores:
    several = [each for each in answers if len({*each.texts}) > 1]
    return run, several[: config.groups]
  groups = judge_agreement.load_groups(pathlib.Path(config.scores), config.videos)
  run = encode_videos(run, [group.video for group in groups], log.print_note)
  seen = [group for group in groups if run.features.has(group.video)]
  if len(seen) < len(groups):
    log.print_note(
      f"judges: {len(groups) - len(seen)} of {len(groups)} videos are not read"
    )
  return run, seen


def measure_correlations(
  run: Run,
  judges: dict[str, tuple[GroupScorer, Params]],
  groups: Sequence[AnswerGroup],
  folder: pathlib.Path,
  log: StageLog,
) -> JsonRow:
  """The correlations of each judge, if there are groups; writes scores.json.

  Args:
    judges: each with the variables that it depends on.
  """
  if not groups:
    return {"judges": {}}
  config, found = run.config.judges, {}
  facts = (run.config.model.prompts, config.prompt_len, config.max_new,
           config.both_orders, resume_policy.select_fixed_settings(config.endpoint, "judges.endpoint"),
           run.config.seed)  # fmt: skip
  how = Resampling(seed=run.config.seed, resamples=config.resamples)
  for name, (score, variables) in judges.items():

    def make(block: range, score: GroupScorer = score) -> list[JsonRow]:
      return score([groups[i] for i in block])

    log.print_note(f"judges: answers to {len(groups)} questions to {name}")
    rows = resumable.load_or_compute(
      folder / f"scored_{name}.jsonl",
      run.watch.wrap_blocks(make),
      count=len(groups),
      batch=config.batch,
      fingerprint=resumable.compute_fingerprint(variables, facts, list(groups)),
    )
    found[name] = {
      way: judge_agreement.correlate_with_people(
        groups, [row[way] for row in rows], how
      )
      for way in GROUPINGS
      if way in rows[0]
    }
  told = {
    "groups": len(groups),
    "answers": sum(len(group.texts) for group in groups),
    "judges": found,
  }
  distributed.on_process_zero(lambda: write_json(folder / "scores.json", told))
  table = [
    {"answers": str(told["answers"]), "judge": name}
    | format_row({way: stats.get(way) or {} for way in GROUPINGS}, PLAIN)
    for name, stats in found.items()
  ]
  log.print_table("Judges: correlation with the right scores [95 % interval]", table)
  return told


def pairwise_scorer(
  run: Run, ask: AskFn, style: generative_rm.JudgeStyle
) -> GroupScorer:
  """A judge that is asked about every two answers to a question."""

  def score(groups):
    known: dict[tuple, str | None] = {}  # Both ways ask some of the same.

    def once(queries):
      known.update(
        ask_unique(ask, [q for q in queries if make_query_key(q) not in known])
      )
      return [known[make_query_key(query)] for query in queries]

    examples = [group.example() for group in groups]
    # As many answers each: those that are empty are not compared.
    longest = max(len(group.texts) for group in groups)
    texts = [[*g.texts, *[""] * (longest - len(g.texts))] for g in groups]
    rows: list[JsonRow] = [{"id": group.id} for group in groups]
    for way, one_opponent in reversed(GROUPINGS.items()):
      compare = generative_rm.compare_in_pairs(
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


def reward_scorer(run: Run, variables: Params) -> GroupScorer:
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
