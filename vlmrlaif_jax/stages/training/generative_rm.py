"""PROGRAM: generative reward models, taught by SFT and by RL.

Generative RLHF-V (2505.18531): a judge is shown two answers, reasons, and scores both;
RL rewards it where the preferred answer has the higher score. Preferences are those
that the reward model is trained on, and the same videos are left out of them.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Params, Parts
from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.data.records import Example, PreferenceExample
from vlmrlaif_jax.data.tokenization import Rows
from vlmrlaif_jax.evals import preference_accuracy
from vlmrlaif_jax.feedback.generative_rm import STYLES, demonstrations, judge_examples
from vlmrlaif_jax.methods import sft as sft_method
from vlmrlaif_jax.runtime import answering, role_params, video_features
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.training import common, rl

Row: TypeAlias = dict[str, Any]
Pairs: TypeAlias = list[PreferenceExample]
# What a judge says of each pair, and what it chooses: a row with "text" and "choice".
Judge: TypeAlias = Callable[[Sequence[PreferenceExample]], list[Row]]


def grm_sft(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Teaches the SFT policy to judge in the form that is asked for, by imitation.

  It is the baseline of the judge that RL makes, and may be where that starts from: the
  paper's judge starts as a model that follows instructions, and one that has never
  seen a box would get no reward to learn from.
  """
  config = run.config.grm_sft
  learned, held = preferences(run, log, least=config.batch_size)
  examples, rows = encoded(
    run,
    demonstrations(learned, STYLES[run.config.model.prompts]),
    config,
    log,
    answered=True,
  )
  params, frozen = role_params.policy_roles(run, role_params.SFT[1])
  common.fit(
    run,
    stage,
    folder,
    log,
    config,
    sft_method.make(config, Parts(policy=run.policy)),
    steps=config.steps,
    params=params,
    frozen={"policy": frozen["policy"]},
    data=common.sft_data(run, "grm_sft", log, config.steps, examples, rows),
  )
  return {"pairs": len(examples), **held_out(run, stage, held, config, log)}


def grm(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Teaches a judge by RL: a verdict is rewarded if it is on the preferred side."""
  config = run.config.grm
  starts = [name for name in role_params.JUDGES if name != stage]
  if config.start not in starts:
    raise ValueError(f"grm.start must be one of {starts}, not {config.start!r}")
  if config.oracle.kind != "verdict":
    raise ValueError(
      f'grm.oracle.kind must be "verdict", not {config.oracle.kind!r}: what a judge '
      "says of two answers is held against a preference"
    )
  learned, held = preferences(run, log, least=config.batch_size)
  asked = judge_examples(learned, STYLES[run.config.model.prompts].prompt)
  examples, rows = encoded(run, asked, config, log, answered=False)
  start = role_params.JUDGES[config.start]
  rl.by_group(
    run,
    stage,
    folder,
    log,
    config,
    examples,
    rows,
    start=start,
    max_new=config.max_new,
  )
  return {"pairs": len(examples), **held_out(run, stage, held, config, log)}


def preferences(run: Run, log: Log, *, least: int) -> tuple[Pairs, Pairs]:
  """(pairs to learn from, pairs held out), as for the reward model.

  Args:
    least: how many there must be in all.
  """
  config = run.config.rm
  source = config.preferences or run.workdir / "label" / "preferences.jsonl"
  pairs = common.preferences(run, source, log, least=least)
  return pipeline.hold_out(pairs, config.holdout, run.config.seed)


def encoded(
  run: Run,
  examples: Sequence[Example],
  config: ConfigDict,
  log: Log,
  *,
  answered: bool,
) -> tuple[list[Example], Rows]:
  """(examples that fit the section's lengths, their rows)."""
  kept, rows, problems = pipeline.encode_examples(
    examples,
    run.tokenizer,
    run.template,
    answered=answered,
    video_tokens=video_features.video_tokens(run, run.config.model.frames),
    prompt_len=config.prompt_len,
    response_len=config.max_new if answered else 0,
    names=(f"{log.stage}.prompt_len", f"{log.stage}.max_new"),
  )
  common.tell_of(problems, len(examples), log)
  return kept, rows


def held_out(run, stage: str, pairs: Pairs, config: ConfigDict, log: Log) -> Row:
  """How often a judge agrees with pairs that it was not taught, at temperature 0."""
  lengths = answering.Sampling(config.prompt_len, config.max_new, config.batch_size)
  rows = by_box(run, role_params.judge_variables(run, stage), lengths)(pairs)
  right = [r["choice"] == p["preference"] for r, p in zip(rows, pairs, strict=True)]
  unread = [row["choice"] is None for row in rows]
  share = lambda marks: sum(marks) / len(marks)
  log.note(
    f"{stage}: {share(right):.1%} of {len(pairs)} held-out pairs are judged as they "
    f"were labelled; {share(unread):.1%} of the verdicts cannot be read"
  )
  return {
    "held_out": len(pairs),
    "held_out_accuracy": share(right),
    "held_out_unread": share(unread),
  }


def by_box(run: Run, variables: Params, sampling: answering.Sampling) -> Judge:
  """A generative reward model, which is shown the answers in the order of the pair."""
  style = STYLES[run.config.model.prompts]
  read = lambda text: preference_accuracy.choice_of_scores(style.read(text))
  return by_asking(run, variables, sampling, style.prompt.format, read)


def by_asking(
  run: Run,
  variables: Params,
  sampling: answering.Sampling,
  prompt: Callable[..., str],
  read: Callable[[str], preference_accuracy.Choice],
) -> Judge:
  """A model that is asked about each pair.

  Args:
    prompt: from `question`, `a` and `b`.
    read: what a reply chooses.
  """

  def judge(pairs):
    prompts = [
      prompt(question=p["question"], a=p["output_1"], b=p["output_2"]) for p in pairs
    ]
    requests = [
      answering.Request(f"judge:{pair['id']}", pair["video"], asked)
      for pair, asked in zip(pairs, prompts, strict=True)
    ]
    replies = answering.answer(run, variables, requests, sampling, seed=run.config.seed)
    texts = answering.first_texts(replies)
    return [
      {"text": text, "choice": None if text is None else read(text)} for text in texts
    ]

  return judge
