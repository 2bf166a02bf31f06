"""The stage `dpo`: DPO on preferences, in rounds or once (RLAIF-V, 2405.17220, 2.3).

The reference is the policy that a round starts with. Its log-probabilities are computed
once and saved in the round's folder, with a fingerprint of the weights and the pairs.
A file with another fingerprint is not read.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed, resumable, sharding
from vlmrlaif_jax.core.errors import check_choices, user_errors
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import (
  ComparedPairs,
  MethodModels,
  Params,
  TrainState,
  merge_params,
)
from vlmrlaif_jax.data.records import PreferenceExample, order_by_preference
from vlmrlaif_jax.methods import dpo as method
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import answering, role_params, scoring, specs, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import UPDATE, DeviceFunction, Workload
from vlmrlaif_jax.stages.labeling import claims
from vlmrlaif_jax.stages.stage import PREFERENCES, Stage
from vlmrlaif_jax.stages.training import common
from vlmrlaif_jax.training import checkpoint
from vlmrlaif_jax.training.job import TrainingJob

# Selection of a round's checkpoint: the last one, or the one with the best responses to
# held-out prompts by their claims; see score_claims.
CHECKPOINT_CHOICES = ("last", "claims")
MAX_LOGGED_ANSWERS = 24  # Held-out prompts whose responses are logged per checkpoint.


def default_config() -> ConfigDict:
  """Returns the settings of the section `dpo`."""
  return common.default_config(
    method.default_config(),
    preferences="",  # File of preferences; "": those of the stage before.
    select="last",  # One of CHECKPOINT_CHOICES.
    steps=placeholder(int),
  )


def check(config: ConfigDict) -> None:
  """Checks the section `dpo`; raises UserError for an invalid value."""
  with user_errors("dpo"):
    method.check(config.dpo)
    check_choices(config.dpo, {"select": CHECKPOINT_CHOICES})
  if config.dpo.select == "claims":
    claims.check(config)


def make_job(run: Run, stage: str) -> TrainingJob:
  """Returns the job that trains the policy's LoRA on pairs."""
  config, data = run.config.dpo, run.config.data
  rows, start, time = config.batch_size, data.prompt_len, data.response_len
  params, frozen = role_params.make_policy_roles(
    run, role_params.get_start_stage(stage)
  )
  update_pass = workloads.make_model_pass(
    run, "train", "policy", rows, start + time, config, start=start, group=2
  )
  ref_logps = jax.ShapeDtypeStruct((rows, 2), jnp.float32)
  pairs = specs.pair_specs(run, rows, start, time)
  return common.make_training_job(
    run,
    stage,
    method=method.make(config, MethodModels(policy=run.policy)),
    params=params,
    frozen={"policy": frozen["policy"]},
    batch_spec=ComparedPairs(pairs, specs.row_specs(ref_logps, run.mesh)),
    passes={UPDATE: [update_pass]},
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: StageLog) -> dict[str, Any]:
  """Trains on the preferences of the config, else of its round or the label stage."""
  config = run.config.dpo
  has_round = stage != role_params.DPO_STAGE
  source = stage.replace(role_params.DPO_STAGE, "claims") if has_round else "label"
  size = config.batch_size
  pairs = common.load_training_preferences(
    run, "dpo", log, min_count=size, stage=source
  )
  job = make_job(run, stage)
  base, start = job.frozen["policy"], job.params
  ref = merge_params(base, start["policy"])
  ref_logps = compute_reference_logps(run, ref, pairs, folder / "ref_logps.jsonl")
  make = lambda rows: ComparedPairs(
    scoring.make_pairs_batch(run, pairs, rows), ref_logps[rows]
  )
  data = common.make_batch_fn(run, len(pairs), size, make)
  common.fit_stage(run, log, job._replace(data=data))
  summary = {"pairs": len(pairs)}
  if config.select == "claims":
    summary |= select_checkpoint(run, base, start, folder, log)
  return summary


def compute_reference_logps(
  run: Run,
  variables: Params,
  pairs: Sequence[PreferenceExample],
  path: pathlib.Path,
) -> Float[np.ndarray, "pairs 2"]:
  """Computes the log-probabilities of chosen and rejected answers, in nats.

  Args:
    run: The run.
    variables: Variables of run.policy.
    pairs: Preferences.
    path: File that caches the result for these weights and these pairs.

  Returns:
    The log-probabilities of the chosen and the rejected answer of each pair.
  """
  config = run.config.dpo
  size = config.batch_size
  pair_logps_fn = _jit_pair_logps(run.policy, config.shared_prefix, config.chunk)

  def make(block: range) -> list[dict[str, Any]]:
    rows = answering.pad_local_indices(run, block, size)
    batch = sharding.shard_batch(scoring.make_pairs_batch(run, pairs, rows), run.mesh)
    logps = distributed.fetch_arrays(pair_logps_fn(variables, batch))[: len(block)]
    return [
      {"id": pairs[i]["id"], "logps": row.tolist()}
      for i, row in zip(block, logps, strict=True)
    ]

  facts = [
    (pair["question"], *order_by_preference(pair), pair.get("history"),
     run.features.digest(pair["video"]))
    for pair in pairs
  ]  # fmt: skip
  lengths = (run.config.data.prompt_len, run.config.data.response_len)
  rows = resumable.load_or_compute(
    path,
    run.watch.wrap_blocks(make),
    count=len(pairs),
    batch=size,
    fingerprint=resumable.compute_fingerprint(variables, lengths, run.template, facts),
  )
  return np.array([row["logps"] for row in rows], np.float32)


@functools.lru_cache
def _jit_pair_logps(model: vlm.VLM, shared_prefix: bool, chunk: int) -> Callable:
  """Returns the jitted function, which all rounds share."""
  config = method.default_config()
  config.update(shared_prefix=shared_prefix, chunk=chunk)
  return jax.jit(
    lambda variables, pairs: method.compute_pair_logps(config, model, variables, pairs)
  )


def select_checkpoint(
  run: Run, base: Params, like: Params, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Selects a checkpoint on held-out prompts and writes selected.json.

  arrays.restore reads the file. Step 0 is the start of the round, which is saved if it
  is the best. The selection depends on the labeler alone, not on the ground truth.

  Args:
    run: The run.
    base: Frozen parameters that the trained ones are merged into.
    like: Trained parameters at the start of the round.
    folder: Folder of the round.
    log: Log of the stage.

  Returns:
    "selected_step" and "held_out_denied", the share of denied claims.
  """
  labeler, _ = claims.make_labeler(run, folder.parent)
  whole_labeler, _ = claims.make_labeler(run, folder.parent, splitter="whole")
  examples = claims.select_held_out_prompts(run)
  sampling = answering.SamplingSettings(
    run.config.data.prompt_len, run.config.data.response_len, run.config.claims.batch
  )

  def measure(step: int, params: Params) -> dict[str, Any]:
    policy = answering.Answerer(run, merge_params(base, params["policy"]), sampling)
    rows = claims.make_claim_rows(policy, examples, labeler)
    log.write_samples(step, rows[:MAX_LOGGED_ANSWERS])
    rates = claims.compute_claim_rates(rows, [])
    whole = whole_labeler(examples, [row["answers"] for row in rows])
    right = [each.score == 0 for (each,) in whole]
    return {
      "step": step,
      "claims": rates["claims"],
      "denied": rates["claims_denied"] or 0.0,
      "right": sum(right) / len(right),
      "score": score_claims(rows, right),
    }

  checkpoints = str(folder / "checkpoints")
  measurements = [measure(0, like)]
  for step in filter(None, checkpoint.list_steps(checkpoints)):
    params = checkpoint.restore_saved_params(checkpoints, like, step)
    measurements.append(measure(step, params))
  log.print_table(
    f"{folder.name}: claims of greedy responses to {len(examples)} held-out prompts; "
    "score: accepted claims of right responses minus all denied ones, per response",
    measurements,
  )
  # Of equal scores, the last one is selected.
  best = max(reversed(measurements), key=lambda row: row["score"])
  if not best["step"]:
    _keep_start(like, folder, log)
  chosen = {**best, "of": measurements}
  distributed.on_process_zero(lambda: write_json(folder / "selected.json", chosen))
  log.print_note(
    f"{folder.name}: selected step {best['step']}, {best['denied']:.1%} denied"
  )
  return {"selected_step": best["step"], "held_out_denied": best["denied"]}


def _keep_start(like: Params, folder: pathlib.Path, log: StageLog) -> None:
  """Saves the start of a round as step 0, which stays the policy, and prints a note."""
  log.print_note(
    f"{folder.name}: no checkpoint is better than the start of the round, which "
    "stays the policy: run fewer rounds, lower "
    "--config.dpo.optimizer.learning_rate, or raise --config.dpo.sft_coef"
  )
  checkpoints = str(folder / "checkpoints")
  steps = checkpoint.list_steps(checkpoints)
  if 0 not in steps:
    start = TrainState(jnp.int32(0), like, jnp.zeros(1))
    keep = len(steps) + 1  # All others, and this one.
    checkpoint.save_train_state(checkpoints, start, 0, keep=keep)


def score_claims(rows: Sequence[JsonRow], right: Sequence[bool]) -> float:
  """Returns the accepted claims of right responses minus all denied claims, on average.

  The share of denied claims would prefer the shortest responses. The accepted claims of
  all responses would prefer descriptions of the video that do not answer the question.

  Args:
    rows: Rows of claims.make_claim_rows with one response each.
    right: Whether the labeler accepts each response as a whole.
  """
  score = 0
  for row, is_right in zip(rows, right, strict=True):
    accepted = [yes > no for yes, no in filter(None, row["chances"][0])]
    score += is_right * sum(accepted) - accepted.count(False)
  return score / len(rows)


def workload(run: Run, stage: str) -> Workload:
  """Returns the workload of the stage."""
  config, job = run.config.dpo, make_job(run, stage)
  ref = merge_params(job.frozen["policy"], job.params["policy"])
  (update_pass,) = job.passes[UPDATE]
  # The reference passes over each pair once, unlike training.
  reference = DeviceFunction(
    "reference",
    _jit_pair_logps(run.policy, config.shared_prefix, config.chunk),
    lambda: (ref, job.batch_spec.pairs),
    {"": [update_pass._replace(phase="forward", role="ref", parts=1)]},
    runs=1.0,
    roles={"ref": ref},
  )
  return common.make_training_workload(run, stage, job, first=[reference])


STAGES = (
  Stage(
    name="dpo",
    title="DPO",
    section="dpo",
    run=train,
    check=check,
    steps="steps",
    reads=lambda config: ("claims",) if config.dpo.select == "claims" else (),
    files={"preferences": PREFERENCES},
    workload=workload,
    trains_policy=True,
    in_rounds=True,
    paper="2405.17220",
  ),
)
