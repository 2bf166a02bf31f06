"""The stages `grm_sft` and `grm`: train generative reward models by SFT and by RL.

Generative RLHF-V (2505.18531): a judge receives two answers, reasons, and scores both.
RL rewards it if the preferred answer has the higher score. The preferences and the
held-out videos are those of the reward model.
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
  join_history,
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
# Judges pairs: pairs -> rows with the response as "text" and the "choice".
PreferenceJudge: TypeAlias = Callable[[Sequence[PreferenceExample]], list[JsonRow]]


def get_grm_sft_config() -> ConfigDict:
  """Returns the settings of the section `grm_sft`."""
  return common.default_config(
    imitation.default_config(),
    prompt_len=placeholder(int),  # Tokens of a judge's prompt, video included.
    max_new=placeholder(int),  # Tokens of a judge's response.
    steps=placeholder(int),
    pack_len=0,  # See sft.default_config.
  )


def get_grm_config() -> ConfigDict:
  """Returns the settings of the section `grm`."""
  config = grpo.default_config()
  config.update(
    start="grm_sft",  # Or "sft", for a model that boxes scores without training.
    prompt_len=placeholder(int),  # Tokens of a judge's prompt, video included.
    max_new=placeholder(int),  # Tokens of a judge's response.
    truncated_responses="keep",  # A truncated verdict has no scores and no reward.
  )
  config.oracle.kind = "verdict"
  return config


def check_grm(config: ConfigDict) -> None:
  """Checks the section `grm`; raises UserError for an invalid value."""
  section = config.grm
  starts = [name for name in role_params.JUDGE_STAGES if name != "grm"]
  grpo.check(config, "grm")
  with user_errors("grm"):
    check_choices(section, {"start": starts})
    if section.oracle.kind != "verdict":
      raise ValueError(
        f'oracle.kind must be "verdict", not {section.oracle.kind!r}: the reward is '
        "whether a verdict agrees with a preference"
      )
  rm.check_holdout(config)


def train_grm_sft(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Trains the SFT policy to write verdicts in the required form, by imitation.

  The result is the baseline of the judge that RL trains, and by default its start. The
  paper starts from a model that follows instructions. A model without boxed scores
  would get no reward.
  """
  pairs, held_out = rm.split_preference_pairs(
    run, log, min_count=run.config.grm_sft.batch_size
  )
  demonstrations = make_demonstrations(pairs, JUDGE_STYLES[run.config.model.prompts])
  examples, _, _ = sft.train_imitation(run, stage, log, demonstrations)
  return {"pairs": len(examples), **measure_held_out(run, stage, held_out, log)}


def train_grm(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Trains a judge by RL: a verdict is rewarded if it is for the preferred answer."""
  pairs, held_out = rm.split_preference_pairs(
    run, log, min_count=run.config.grm.batch_size
  )
  prompts = make_judge_examples(pairs, JUDGE_STYLES[run.config.model.prompts])
  examples, _ = grpo.train_groups(run, stage, folder, log, prompts)
  return {"pairs": len(examples), **measure_held_out(run, stage, held_out, log)}


def measure_held_out(run: Run, stage: str, pairs: Pairs, log: StageLog) -> JsonRow:
  """Measures the accuracy of a judge on held-out pairs, at temperature 0."""
  config = run.config[stage]
  sampling = answering.SamplingSettings(
    config.prompt_len, config.max_new, config.batch_size
  )
  ask = answering.Answerer(run, role_params.load_judge(run, stage), sampling).ask_judge
  rows = make_prompted_judge(ask, JUDGE_STYLES[run.config.model.prompts])(pairs)
  correct = [r["choice"] == p["preference"] for r, p in zip(rows, pairs, strict=True)]
  unread = [row["choice"] is None for row in rows]
  share = lambda marks: sum(marks) / len(marks)
  log.print_note(
    f"{stage}: {share(correct):.1%} of {len(pairs)} held-out pairs are judged like "
    f"their labels; {share(unread):.1%} of the verdicts cannot be parsed"
  )
  return {
    "held_out": len(pairs),
    "held_out_accuracy": share(correct),
    "held_out_unread": share(unread),
  }


def make_prompted_judge(ask: AskFn, style: JudgeStyle) -> PreferenceJudge:
  """Returns a judge that prompts a model with the answers in the order of the pair."""

  def judge(pairs):
    queries = [
      JudgeQuery(
        f"judge:{p['id']}",
        p["video"],
        style.prompt.format(question=join_history(p), a=p["output_1"], b=p["output_2"]),
      )
      for p in pairs
    ]
    choose = lambda text: judge_agreement.choose_by_scores(style.read(text))
    return [
      {"text": text, "choice": None if text is None else choose(text)}
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
    reads=lambda config: ("rm",),  # The preferences and the held-out share.
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
