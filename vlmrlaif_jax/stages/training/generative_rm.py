"""The stages `grm_sft` and `grm`: generative reward models, taught by SFT and by RL.

Generative RLHF-V (2505.18531): a judge is shown two answers, reasons, and scores both;
RL rewards it where the preferred answer has the higher score. Preferences are those
that the reward model is trained on, and the same videos are left out of them.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import check_choices, user_errors
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.data.records import PreferenceExample
from vlmrlaif_jax.evals import judge_agreement
from vlmrlaif_jax.feedback.generative_rm import (
  JUDGE_STYLES,
  JudgeStyle,
  make_demonstrations,
  make_judge_examples,
)
from vlmrlaif_jax.feedback.pairwise_judge import AskFn, JudgeQuery
from vlmrlaif_jax.methods import sft as imitation
from vlmrlaif_jax.runtime import answering, role_params
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.stage import Stage
from vlmrlaif_jax.stages.training import common, grpo, rm, sft

Pairs: TypeAlias = list[PreferenceExample]
# What a judge says of each pair, and what it chooses: a row with "text" and "choice".
PreferenceJudge: TypeAlias = Callable[[Sequence[PreferenceExample]], list[JsonRow]]


def get_grm_sft_config() -> ConfigDict:
  """Returns the settings of the section `grm_sft`."""
  return common.default_config(
    imitation.default_config(),
    prompt_len=placeholder(int),  # Tokens of what a judge is asked, video included.
    max_new=placeholder(int),  # Tokens of what it says.
    steps=placeholder(int),
    pack_len=0,  # See sft.default_config.
  )


def get_grm_config() -> ConfigDict:
  """Returns the settings of the section `grm`."""
  config = grpo.default_config()
  config.update(
    start="grm_sft",  # Or "sft", for a model that says scores in a box untaught.
    prompt_len=placeholder(int),  # Tokens of what a judge is asked, video included.
    max_new=placeholder(int),  # Tokens of what it says.
    truncated_responses="keep",  # A verdict without scores is worth nothing anyway.
  )
  config.oracle.kind = "verdict"
  return config


def check_grm(config: ConfigDict) -> None:
  """Checks the section `grm`."""
  given = config.grm
  starts = [name for name in role_params.JUDGE_STAGES if name != "grm"]
  grpo.check(config, "grm")
  with user_errors("grm"):
    check_choices(given, {"start": starts})
    if given.oracle.kind != "verdict":
      raise ValueError(
        f'oracle.kind must be "verdict", not {given.oracle.kind!r}: the reward is '
        "whether a verdict agrees with a preference"
      )
  rm.check_holdout(config)


def train_grm_sft(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Teaches the SFT policy to judge in the form that is asked for, by imitation.

  It is the baseline of the judge that RL makes, and may be where that starts from: the
  paper's judge starts as a model that follows instructions, and one that has never
  seen a box would get no reward to learn from.
  """
  learned, held = rm.split_preference_pairs(
    run, log, least=run.config.grm_sft.batch_size
  )
  shown = make_demonstrations(learned, JUDGE_STYLES[run.config.model.prompts])
  examples, _, _ = sft.train_imitation(run, stage, log, shown)
  return {"pairs": len(examples), **measure_held_out(run, stage, held, log)}


def train_grm(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Teaches a judge by RL: a verdict is rewarded if it is on the preferred side."""
  learned, held = rm.split_preference_pairs(run, log, least=run.config.grm.batch_size)
  asked = make_judge_examples(learned, JUDGE_STYLES[run.config.model.prompts])
  examples, _ = grpo.train_groups(run, stage, folder, log, asked)
  return {"pairs": len(examples), **measure_held_out(run, stage, held, log)}


def measure_held_out(run: Run, stage: str, pairs: Pairs, log: StageLog) -> JsonRow:
  """How often a judge agrees with pairs that it was not taught, at temperature 0."""
  config = run.config[stage]
  lengths = answering.SamplingSettings(
    config.prompt_len, config.max_new, config.batch_size
  )
  ask = answering.Answerer(run, role_params.load_judge(run, stage), lengths).ask_judge
  rows = prompted_judge(ask, JUDGE_STYLES[run.config.model.prompts])(pairs)
  right = [r["choice"] == p["preference"] for r, p in zip(rows, pairs, strict=True)]
  unread = [row["choice"] is None for row in rows]
  share = lambda marks: sum(marks) / len(marks)
  log.print_note(
    f"{stage}: {share(right):.1%} of {len(pairs)} held-out pairs are judged as they "
    f"were labelled; {share(unread):.1%} of the verdicts cannot be read"
  )
  return {
    "held_out": len(pairs),
    "held_out_accuracy": share(right),
    "held_out_unread": share(unread),
  }


def prompted_judge(ask: AskFn, style: JudgeStyle) -> PreferenceJudge:
  """A model that is shown the answers in the order of the pair."""

  def judge(pairs):
    queries = [
      JudgeQuery(
        f"judge:{p['id']}",
        p["video"],
        style.prompt.format(question=p["question"], a=p["output_1"], b=p["output_2"]),
      )
      for p in pairs
    ]
    read = lambda text: judge_agreement.choose_by_scores(style.read(text))
    return [
      {"text": text, "choice": None if text is None else read(text)}
      for text in ask(queries)
    ]

  return judge


STAGES = (
  Stage(
    name="grm_sft",
    title="Generative reward model by SFT",
    section="grm_sft",
    run=train_grm_sft,
    check=rm.check_holdout,
    steps="steps",
    reads=lambda config: ("rm",),  # The preferences, and the share held out.
    workload=sft.workload,
    paper="2505.18531",
  ),
  Stage(
    name="grm",
    title="Generative reward model by RL",
    section="grm",
    run=train_grm,
    check=check_grm,
    steps="steps",
    reads=lambda config: ("rm",),
    workload=grpo.workload,
    has_rollouts=True,
    paper="2505.18531",
  ),
)
