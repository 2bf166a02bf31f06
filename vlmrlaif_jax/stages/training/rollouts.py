"""Settings, samples and metrics of the stages that train on rollouts."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import subsection
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import ModelPass, RemoteSampler
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.templates import show_media
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.runtime import answering, video, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.sampling.generate import SAMPLING_SETTINGS
from vlmrlaif_jax.stages.training import (
  common,
  oracles,
  planned_sampler,
  rollout_settings,
  server_sampler,
)

# Entries of the info of `collect` that samples need.
ROLLOUT_COLUMNS = (
  *("tokens", "loss_mask", "scores", "valid", "has_stop"),
  *("row_advantages", "row_kl", "sampled_rows"),
)


def get_rollout_settings() -> dict[str, Any]:
  """Returns the settings of a stage that trains on rollouts."""
  return dict(
    steps=placeholder(int),  # Number of rollouts.
    epochs=1,  # Passes over each rollout.
    minibatches=placeholder(int),  # Updates per pass.
    samples_every=placeholder(int),  # Steps between two files of samples.
    rollout=rollout_settings.default_config(),
  )


def check(config: ConfigDict) -> None:
  """Checks the settings of the engine that samples; `config` is a stage's section.

  Raises:
    ValueError: A value is invalid. The message starts with the setting's name.
  """
  with subsection("rollout"):
    rollout_settings.check(config.rollout)
  if config.rollout.engine != "jax" and config.temperature != 1:
    raise ValueError(
      f"temperature={config.temperature} must be 1 for rollout.engine="
      f"{config.rollout.engine}, because servers return the log-probabilities of "
      "temperature 1"
    )
  if config.rollout.engine != "jax" and not config.tis_max:
    remedy = "tis_max=2" + (" and old_logps=computed" if "old_logps" in config else "")
    raise ValueError(
      f"tis_max=0 ignores that the probabilities of rollout.engine="
      f"{config.rollout.engine} differ a little from the trainer's: set {remedy}"
    )


def make_rollout_sampler(
  run: Run, config: ConfigDict, max_new: int, folder: pathlib.Path
) -> server_sampler.ServerSampler | None:
  """Returns the sampler of a stage's servers; None if the devices sample.

  Args:
    run: The run.
    config: Section of the stage.
    max_new: Maximum length of a response, in tokens.
    folder: Folder of the stage.
  """
  if config.rollout.engine == "jax":
    return None
  settings = server_sampler.ServerSettings(
    max_new=max_new,
    **{name: config[name] for name in SAMPLING_SETTINGS if name != "slots"},
    **answering.get_token_ids(run),
  )
  return server_sampler.ServerSampler(
    config.rollout, run.policy, settings, folder / "adapters"
  )


def plan_sampling(
  run: Run, config: ConfigDict, sampling: answering.SamplingSettings
) -> tuple[RemoteSampler | None, dict[str, list[ModelPass]]]:
  """Returns the sampler of a plan, None for the devices, and the passes by name.

  Args:
    run: The run.
    config: Section of the stage.
    sampling: Settings of sampling; the batch is that of a step's prompts.
  """
  if config.rollout.engine == "jax":
    passes = workloads.make_sampling_passes(
      run, sampling.batch, sampling, slots=config.slots
    )
    return None, {"sample": passes}
  max_new = sampling.max_new
  return planned_sampler.PlannedSampler(run.policy, config.samples, max_new), {}


class StepSamples(NamedTuple):
  """The responses of a step, one row each."""

  examples: list[Example]  # The example of each response.
  texts: list[str]
  mistakes: list[int | None]  # Mistakes by the ground truth; None without it.
  info: dict[str, np.ndarray]  # The entries ROLLOUT_COLUMNS.


def compute_accuracy(sampled: StepSamples) -> dict[str, float]:
  """Computes the accuracy of the responses where it is known.

  Returns:
    "truth": accuracy by the ground truth of the embedded world. "met_reference": share
    of responses that match the example's own answer. Unknown values are absent.
  """
  is_correct = [wrong == 0 for wrong in sampled.mistakes if wrong is not None]
  rows = zip(sampled.examples, sampled.texts, sampled.mistakes, strict=True)
  verdicts = [
    truth.judge_answer(example, text)
    for example, text, wrong in rows
    if wrong is None and example["answer"]
  ]
  has_matched = [verdict.correct for verdict in verdicts if verdict.correct is not None]
  shares = {"truth": is_correct, "met_reference": has_matched}
  return {name: float(np.mean(each)) for name, each in shares.items() if each}


def should_log_samples(config: ConfigDict, step: int) -> bool:
  """Returns whether the samples of a step, counted from 0, are logged."""
  return (step + 1) % config.samples_every == 0 or step == 0


def make_sample_rows(
  run: Run, sampled: StepSamples, oracle: oracles.Oracle
) -> list[JsonRow]:
  """Returns a row for each response, as the report reads it.

  The first row of an example contains the judge's replies about its responses.
  """
  info, rows = sampled.info, []
  terms = oracle.get_terms()
  pick = lambda values, i: {
    name: float(x[info["sampled_rows"][i]]) for name, x in values.items()
  }
  for i, example in enumerate(sampled.examples):
    is_first = i == 0 or sampled.examples[i - 1] is not example
    replies = oracle.list_replies(example) if is_first else []
    valid, wrong = bool(info["valid"][i]), sampled.mistakes[i]
    row = {
      "id": example["id"],
      "video": video.get_report_path(run, example),
      "kind": (example.get("truth") or {}).get("kind"),
      "prompt": show_media(example["question"]),
      "response": sampled.texts[i],
      "score": float(info["scores"][i]),
      "terms": pick(terms.weighted, i) if valid else {},
      "raw_terms": pick(terms.raw, i) if valid else {},
      "kl": float(info["row_kl"][i]),
      "valid": valid,
      "advantage": float(info["row_advantages"][i]),
      "has_stop": bool(info["has_stop"][i]),
      "truth": None if wrong is None else wrong == 0,
    }
    rows.append(row | ({"judge": replies} if replies else {}))
  return rows


def make_recorder(
  run: Run,
  config: ConfigDict,
  examples: Sequence[Example],
  log: StageLog,
  oracle: oracles.Oracle,
  *,
  prompts: int,
) -> Callable[[int, Any, Mapping[str, Any]], dict[str, float]]:
  """Returns the hook that logs the samples of a step and computes their metrics.

  Args:
    run: The run.
    config: The section of the stage.
    examples: The examples of the stage.
    log: The log of the stage.
    oracle: Oracle that scored the responses of the step last.
    prompts: Examples for which a step samples, among them those of the samples.
  """

  def record(step: int, data: Any, info: Mapping[str, Any]) -> dict[str, float]:
    columns = distributed.fetch_arrays({name: info[name] for name in ROLLOUT_COLUMNS})
    reported = {}
    if oracle.report:
      groups = columns["scores"].reshape(-1, config.samples)
      columns["scores"] = oracle.report(groups).reshape(-1)
      # It replaces the mean of the ranks.
      mean = np.mean(columns["scores"], where=columns["valid"])
      reported["reward"] = float(mean)
    tokens, mask = columns["tokens"], columns["loss_mask"]
    texts = tokenization.decode_responses(run.tokenizer, tokens, mask)
    indices = common.batch_indices(run, len(examples), prompts, step)
    prompt_rows = columns["sampled_rows"] // config.samples
    step_examples = [examples[i] for i in indices[prompt_rows]]
    mistakes = [
      truth.count_answer_mistakes(e, t)
      for e, t in zip(step_examples, texts, strict=True)
    ]
    sampled = StepSamples(step_examples, texts, mistakes, columns)
    if should_log_samples(config, step):
      log.write_samples(step + 1, make_sample_rows(run, sampled, oracle))
    return compute_accuracy(sampled) | oracle.get_metrics() | reported

  return record
