"""Functions that the stages share which sample what they learn from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.runtime import video
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.training import common, oracles

ROLLOUT_COLUMNS = (  # Of what collect tells.
  *("tokens", "loss_mask", "scores", "valid", "has_stop"),
  *("row_advantages", "row_kl"),
)


def get_rollout_settings() -> dict[str, Any]:
  """Returns the settings of a stage that learns from rollouts."""
  return dict(
    steps=placeholder(int),  # Rollouts.
    epochs=1,  # Passes over each rollout.
    minibatches=placeholder(int),  # Updates in each pass.
    samples_every=placeholder(int),  # Steps between two files of samples.
  )


class StepSamples(NamedTuple):
  """The responses of a step, with a row for each."""

  asked: list[Example]
  texts: list[str]
  mistakes: list[int | None]
  info: dict[str, np.ndarray]  # Of KEPT.


def compute_accuracy(sampled: StepSamples) -> dict[str, float]:
  """How right the responses are, if that is known: the share that are by the "truth" of
  the embedded world, or that have "met_reference", a user's own answer.
  """
  known = [wrong == 0 for wrong in sampled.mistakes if wrong is not None]
  rows = zip(sampled.asked, sampled.texts, sampled.mistakes, strict=True)
  verdicts = [
    truth.judge_answer(example, said)
    for example, said, wrong in rows
    if wrong is None and example["answer"]
  ]
  met = [verdict.correct for verdict in verdicts if verdict.correct is not None]
  shares = {"truth": known, "met_reference": met}
  return {name: float(np.mean(each)) for name, each in shares.items() if each}


def should_log_samples(config: ConfigDict, step: int) -> bool:
  """Whether a step, counted from 0, is one whose answers are kept."""
  return (step + 1) % config.samples_every == 0 or step == 0


def make_sample_rows(
  run: Run, sampled: StepSamples, oracle: oracles.Oracle
) -> list[JsonRow]:
  """A row for each response, as the report shows it.

  What a judge said stands in the row of an example's first response.
  """
  parts, info, made = oracle.terms(sampled.info), sampled.info, []
  for i, example in enumerate(sampled.asked):
    first = i == 0 or sampled.asked[i - 1] is not example
    judged = oracle.said(example) if first else []
    valid, wrong = bool(info["valid"][i]), sampled.mistakes[i]
    row = {
      "id": example["id"],
      "video": video.get_report_path(run, example),
      "kind": (example.get("truth") or {}).get("kind"),
      "prompt": example["question"],
      "response": sampled.texts[i],
      "score": float(info["scores"][i]),
      "terms": {name: float(x[i]) for name, x in parts.items()} if valid else {},
      "kl": float(info["row_kl"][i]),
      "valid": valid,
      "advantage": float(info["row_advantages"][i]),
      "has_stop": bool(info["has_stop"][i]),
      "truth": None if wrong is None else wrong == 0,
    }
    made.append(row | ({"judge": judged} if judged else {}))
  return made


def make_recorder(
  run: Run,
  config: ConfigDict,
  examples: Sequence[Example],
  log: StageLog,
  oracle: oracles.Oracle,
) -> Callable[[int, Any, Mapping[str, Any]], dict[str, float]]:
  """Returns the hook that writes the samples of a step and tells of them.

  Args:
    config: the section of the stage; it has batch_size and samples.
    examples: those that the stage asks about.
    oracle: scores nothing between a rollout and its hook.
  """

  def record(step: int, data: Any, info: Mapping[str, Any]) -> dict[str, float]:
    found = distributed.fetch_arrays({name: info[name] for name in ROLLOUT_COLUMNS})
    said, mask = found["tokens"], found["loss_mask"]
    texts = tokenization.decode_responses(run.tokenizer, said, mask)
    order = common.batch_indices(run, len(examples), config.batch_size, step)
    asked = [examples[i] for i in np.repeat(order, config.samples)]
    wrong = [
      truth.count_answer_mistakes(e, t) for e, t in zip(asked, texts, strict=True)
    ]
    sampled = StepSamples(asked, texts, wrong, found)
    if should_log_samples(config, step):
      log.write_samples(step + 1, make_sample_rows(run, sampled, oracle))
    return compute_accuracy(sampled) | oracle.told()

  return record
