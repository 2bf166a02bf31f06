"""What judges score answers, held against what people or truth score them.

Generative RLHF-V (2505.18531), table 1: a generative reward model compares answers two
at a time. "grouped": an answer's score is the mean over all others to the question;
"single": over one other, drawn. A scalar reward model scores each answer by itself.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from vlmrlaif_jax.core import distributed, resumable
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.evals import mllm_judge
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.evals.mllm_judge import Group
from vlmrlaif_jax.evals.summary import PLAIN, format_row
from vlmrlaif_jax.feedback import generative_rm
from vlmrlaif_jax.feedback.pairwise_judge import Ask, ask_once, same
from vlmrlaif_jax.runtime import resume_policy, scoring
from vlmrlaif_jax.runtime.run import Run

Row: TypeAlias = dict[str, Any]
# The scores of each group's answers by way, "single" or "grouped"; None for none.
Scorer: TypeAlias = Callable[[Sequence[Group]], list[Row]]
WAYS = {"single": True, "grouped": False}  # Whether an answer meets one other alone.


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
      way: mllm_judge.pearson(groups, [row[way] for row in rows], how)
      for way in WAYS
      if way in rows[0]
    }
  told = {
    "groups": len(groups),
    "answers": sum(len(group.texts) for group in groups),
    "judges": {
      name: {way: stat and stat._asdict() for way, stat in each.items()}
      for name, each in found.items()
    },
  }
  distributed.once(lambda: write_json(folder / "scores.json", told))
  log.table("Judges: correlation with the right scores [95 % interval]", table(told))
  return told


def table(told: Row) -> list[Row]:
  """Returns a row for each judge."""
  return [
    {"answers": str(told["answers"]), "judge": name}
    | format_row({way: stats.get(way) or {} for way in WAYS}, PLAIN)
    for name, stats in told["judges"].items()
  ]


def by_comparing(run: Run, ask: Ask, style: generative_rm.Style) -> Scorer:
  """A judge that is asked about every two answers to a question."""

  def score(groups):
    known: dict[tuple, str | None] = {}  # Both ways ask some of the same.

    def once(queries):
      known.update(ask_once(ask, [q for q in queries if same(q) not in known]))
      return [known[same(query)] for query in queries]

    return _in_sizes(groups, lambda part: _compared(run, once, style, part))

  return score


def _compared(
  run, ask, style: generative_rm.Style, groups: Sequence[Group]
) -> list[Row]:
  """Of groups that have as many answers each."""
  found = {}
  for way, one_opponent in reversed(WAYS.items()):
    compare = generative_rm.by_comparison(
      ask,
      style,
      both_orders=run.config.judges.both_orders,
      one_opponent=one_opponent,
    )
    examples = [group.example() for group in groups]
    made = compare(examples, [group.texts for group in groups])
    valid = zip(made.scores.tolist(), made.valid.tolist(), strict=True)
    found[way] = [
      [x if ok else None for x, ok in zip(scores, oks, strict=True)]
      for scores, oks in valid
    ]
  return [
    {"id": group.id, **{way: rows[i] for way, rows in found.items()}}
    for i, group in enumerate(groups)
  ]


def _in_sizes(groups: Sequence[Group], score: Scorer) -> list[Row]:
  """Rows in the order of the groups, which are scored by how many answers they have."""
  sizes = {len(group.texts) for group in groups}
  found: dict[int, Row] = {}
  for size in sorted(sizes):
    here = [i for i, group in enumerate(groups) if len(group.texts) == size]
    rows = score([groups[i] for i in here])
    found |= dict(zip(here, rows, strict=True))
  return [found[i] for i in range(len(groups))]


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
