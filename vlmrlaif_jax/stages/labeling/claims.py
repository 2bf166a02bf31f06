"""The stage `claims`: preferences by divide and conquer (RLAIF-V, 2405.17220, 2.2).

A policy answers each prompt several times under other seeds; each answer is divided
into claims, and a labeler that sees the video says of each whether it holds. An answer
of which fewer claims are denied is preferred. What it writes:
  answers.jsonl       every prompt's answers, their claims and verdicts; a killed run
                      goes on from it, and it is made anew if a model has changed
  preferences.jsonl   the pairs
  rates.json          what became of all answers and pairs
"""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import resumable
from vlmrlaif_jax.core.errors import (
  check_at_least,
  check_choices,
  subsection,
  user_errors,
)
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.world.statements import statements
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.feedback import claims, endpoint
from vlmrlaif_jax.runtime import (
  answering,
  resume_policy,
  role_params,
  video,
  workloads,
)
from vlmrlaif_jax.runtime.answering import Sampling
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.labeling import claim_pairs, claim_probabilities
from vlmrlaif_jax.stages.stage import Stage

Row = dict[str, Any]

# How answers are divided: by the embedded world's rules; not at all, an answer being
# one claim, for comparison; by the SFT policy; by an OpenAI-compatible server.
SPLITTERS = ("rules", "whole", "self", "endpoint")
# Who says whether a claim holds: the model before SFT, the SFT policy, or a server.
LABELERS = ("base", "sft", "endpoint")


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      # Of each round; 0: all. Each round has others, as far as they go.
      prompts=placeholder(int),
      holdout=0.1,  # Of the prompts' videos, to choose checkpoints on; see dpo.select.
      samples=10,  # Answers to each prompt.
      temperature=0.7,  # Of the answers.
      top_p=1.0,
      splitter=placeholder(str),  # One of SPLITTERS.
      labeler="base",  # One of LABELERS.
      pairs=2,  # Of each prompt, at most.
      gap=1,  # Least difference of the scores of a pair.
      balance=True,  # Leave out pairs, so that chosen and rejected are equally long.
      # Tokens of a row: the video once, and questions about it.
      check_len=placeholder(int),
      check_rows=placeholder(int),  # At once.
      split_prompt_len=placeholder(int),  # Of "self": tokens of what it is asked.
      split_max_new=placeholder(int),
      batch=64,  # Prompts at once.
      block=64,  # Prompts; what a killed run loses at most.
      endpoint=endpoint.default_config(),
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `claims`."""
  given = config.claims
  with user_errors("claims"):
    check_choices(given, {"splitter": SPLITTERS, "labeler": LABELERS})
    check_at_least(given, {"samples": 2, "prompts": 0, "temperature": 0, "pairs": 1})
    # `batch` here too: dpo.select reads it where no stage `claims` runs.
    check_at_least(given, {"batch": 1, "check_rows": 1, "gap": 0})
    if not 0 < given.holdout < 1:
      raise ValueError(f"holdout must be between 0 and 1, not {given.holdout}")
    if "endpoint" in (given.splitter, given.labeler):
      with subsection("endpoint"):
        endpoint.check(given.endpoint)


def total_steps(run: Run) -> int:
  """Blocks."""
  return math.ceil(len(prompts_of(run, 1)) / run.config.claims.block)


def prompts_of(run: Run, number: int) -> list[Example]:
  """The prompts of a round, counted from 1; none is held out."""
  config = run.config.claims
  learned, _ = pipeline.hold_out(run.splits.prompts, config.holdout, run.config.seed)
  count = min(config.prompts or len(learned), len(learned))
  order = pipeline.rows_of_step(
    len(learned), count, seed=run.config.seed, step=number - 1
  )
  return [learned[i] for i in dict.fromkeys(order.tolist())]


def held_out(run: Run) -> list[Example]:
  """The prompts that no round answers."""
  config = run.config.claims
  return pipeline.hold_out(run.splits.prompts, config.holdout, run.config.seed)[1]


def label_claims(
  run: Run, stage: str, folder: pathlib.Path, log: Log
) -> dict[str, Any]:
  """Labels a round's prompts with the policy of the round before.

  Returns:
    What rates.json holds; see `rates`.
  """
  config = run.config.claims
  examples = prompts_of(run, role_params.round_of(stage))
  _, frozen = role_params.policy_roles(run, role_params.start_of(stage))
  labeler = make_labeler(run, folder.parent)
  log.note(f"{stage}: {config.samples} answers to each of {len(examples)} prompts")
  sampling = answering.sampling_of(run.config, "claims", config.samples)

  def make(block: range) -> list[Row]:
    asked = [examples[i] for i in block]
    replies = ask(run, frozen["ref"], asked, sampling)
    return rows_of(asked, replies, labeler)

  asked = [(e["id"], e["question"], run.features.digest(e["video"]))
           for e in examples]  # fmt: skip
  rows = resumable.kept_rows(
    folder / "answers.jsonl",
    run.watch.blocks(make),
    count=len(examples),
    batch=config.block,
    fingerprint=resumable.fingerprint(
      {"policy": frozen["ref"], "labeler": labeler.variables},
      sampling.facts(),
      resume_policy.fixed(config, "claims"),
      run.config.seed,
      asked,
    ),
    tell=lambda done: log.progress(
      min(math.ceil(done / config.block), total_steps(run)), {}
    ),
  )
  return claim_pairs.write(run, stage, examples, rows, folder, log)


def ask(
  run: Run,
  variables: Params,
  examples: Sequence[Example],
  sampling: answering.Sampling,
) -> list[list[answering.Reply]]:
  """Answers of a policy to questions."""
  asked = [
    answering.Request(f"answer:{e['id']}", e["video"], e["question"]) for e in examples
  ]
  return answering.Answerer(run, variables, sampling).replies(asked)


class Labeler(NamedTuple):
  """What divides answers into claims, and says of each claim whether it holds."""

  run: Run
  variables: Params  # Of the model that labels; {} for a server.
  # From groups of answers to what becomes of each answer.
  label: Callable[[Sequence[claims.Group]], list[list[claims.Checked]]]


def make_labeler(run: Run, folder: pathlib.Path) -> Labeler:
  """Returns the labeler that the config selects.

  Args:
    run: the run.
    folder: where what a server says is kept.
  """
  config = run.config.claims
  variables: Params = {}
  server = functools.cache(
    lambda: endpoint.Endpoint(config.endpoint, folder / "endpoint.jsonl").ask
  )
  if config.labeler == "endpoint":
    yes_no = claims.by_text(server())
  else:
    variables = run.base
    if config.labeler == "sft":
      variables = role_params.judge_variables(run, "sft")
    yes_no = lambda queries: claim_probabilities.ask(
      run, variables, queries, length=config.check_len, rows=config.check_rows
    )
  divide = _divider(run, server)
  return Labeler(
    run, variables, lambda groups: claims.check_claims(groups, divide, yes_no)
  )


def _divider(run: Run, server: Callable[[], claims.Ask]) -> claims.Divide:
  config, prompts = run.config.claims, claims.STYLES[run.config.model.prompts]
  if config.splitter == "endpoint":
    return claims.by_asking(server(), prompts)
  if config.splitter == "self":  # The SFT policy, at temperature 0.
    sampling = Sampling(config.split_prompt_len, config.split_max_new, config.batch)
    variables = role_params.judge_variables(run, "sft")
    return claims.by_asking(answering.Answerer(run, variables, sampling).ask, prompts)
  whole = lambda question, said: [(question, said)] if said else []
  rule = statements if config.splitter == "rules" else whole
  return claims.by_rule(rule, run.prompts.check)


# Answers and pairs.


def rows_of(
  examples: Sequence[Example],
  replies: Sequence[Sequence[answering.Reply]],
  labeler: Labeler,
) -> list[Row]:
  """A row for each prompt: its answers, and what became of them."""
  groups = [
    claims.Group(e["id"], e["video"], e["question"], tuple(r.text for r in said))
    for e, said in zip(examples, replies, strict=True)
  ]
  return [
    {
      "id": example["id"],
      "video": video.shown_video(labeler.run, example),
      "question": example["question"],
      "answers": list(group.answers),
      "stopped": [reply.stopped for reply in said],
      "outcomes": [each.outcome for each in checked],
      "scores": [each.score for each in checked],
      "claims": [list(each.claims) for each in checked],
      "chances": [list(each.chances) for each in checked],
      "mistakes": [truth.mistakes(example, reply.text) for reply in said],
      "unsupported": [truth.unsupported(example, reply.text) for reply in said],
    }
    for example, group, said, checked in zip(
      examples, groups, replies, labeler.label(groups), strict=True
    )
  ]


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs."""
  config, data = run.config.claims, run.config.data
  _, frozen = role_params.policy_roles(run, role_params.start_of(stage))
  sampling = answering.sampling_of(run.config, "claims", config.samples)
  each = [
    workloads.encode(run, config.batch),
    workloads.answer(run, frozen["ref"], "answers", sampling, runs=1.0),
  ]
  if config.splitter == "self":
    split = Sampling(config.split_prompt_len, config.split_max_new, config.batch)
    runs = float(config.samples)
    each.append(workloads.answer(run, frozen["ref"], "split", split, runs=runs))
  tokens = config.batch * config.samples * (data.prompt_len + data.response_len)
  return Workload(each, 0, config.batch, tokens)


STAGES = (
  Stage(
    name="claims",
    title="Claims of the policy's answers, one by one",
    section="claims",
    run=label_claims,
    total_steps=total_steps,
    check=check,
    workload=workload,
    in_rounds=True,
    paper="2405.17220",
  ),
)
