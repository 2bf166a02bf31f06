"""The stage `dpo`: DPO on preferences, once or in rounds (RLAIF-V, 2405.17220, 2.3).

The reference is the policy that a round starts with. What it thinks of the pairs is
computed once and kept beside the round, under a name made of its weights and the pairs:
that of another model is never read.
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
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import ComparedPairs, MethodModels, Params, merge_params
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

# Which checkpoint a round leaves: its last, or the one whose answers to held-out
# prompts make the most claims that the labeler accepts, less those that it denies. The
# share denied alone would choose what says the least.
SELECT = ("last", "claims")
MAX_LOGGED_ANSWERS = 24  # Held-out prompts whose answers are kept of each checkpoint.


def default_config() -> ConfigDict:
  """Returns the settings of the section `dpo`."""
  return common.default_config(
    method.default_config(),
    preferences="",  # A file of preferences; "": those of the stage before.
    select="last",  # One of SELECT.
    steps=placeholder(int),
  )


def check(config: ConfigDict) -> None:
  """Checks the section `dpo`."""
  with user_errors("dpo"):
    method.check(config.dpo)
    check_choices(config.dpo, {"select": SELECT})
  if config.dpo.select == "claims":
    claims.check(config)


def make_job(run: Run, stage: str) -> TrainingJob:
  """Returns the job that trains the policy's LoRA on pairs."""
  config, data = run.config.dpo, run.config.data
  rows, start, time = config.batch_size, data.prompt_len, data.response_len
  params, frozen = role_params.make_policy_roles(
    run, role_params.get_start_stage(stage)
  )
  learns = workloads.make_model_pass(
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
    passes={UPDATE: [learns]},
  )


def train(run: Run, stage: str, folder: pathlib.Path, log: StageLog) -> dict[str, Any]:
  """Trains on the preferences given, on those of its round, or of the label stage."""
  config = run.config.dpo
  has_round = stage != role_params.DPO_STAGE
  made_by = stage.replace(role_params.DPO_STAGE, "claims") if has_round else "label"
  size = config.batch_size
  pairs = common.load_training_preferences(run, "dpo", log, least=size, stage=made_by)
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
  """What a policy thinks of the chosen and the rejected answers, in nats.

  Args:
    variables: of run.policy.
    path: of the file that keeps them, for these weights and these pairs alone.
  """
  config = run.config.dpo
  size = config.batch_size
  logps_of = _pair_logps(run.policy, config.shared_prefix, config.chunk)

  def make(block: range) -> list[dict[str, Any]]:
    rows = answering.pad_local_indices(run, block, size)
    batch = sharding.shard_batch(scoring.make_pairs_batch(run, pairs, rows), run.mesh)
    made = distributed.fetch_arrays(logps_of(variables, batch))[: len(block)]
    return [
      {"id": pairs[i]["id"], "logps": logps.tolist()}
      for i, logps in zip(block, made, strict=True)
    ]

  told = [
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
    fingerprint=resumable.compute_fingerprint(variables, lengths, run.template, told),
  )
  return np.array([row["logps"] for row in rows], np.float32)


@functools.lru_cache
def _pair_logps(model: vlm.VLM, shared_prefix: bool, chunk: int) -> Callable:
  """Compiled once for all rounds."""
  config = method.default_config()
  config.update(shared_prefix=shared_prefix, chunk=chunk)
  return jax.jit(
    lambda variables, pairs: method.compute_pair_logps(config, model, variables, pairs)
  )


def select_checkpoint(
  run: Run, base: Params, like: Params, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Chooses a checkpoint on held-out prompts and writes selected.json.

  arrays.restore reads it. Truth plays no part: the labeler alone judges.

  Args:
    base: what the trained part is laid over.
    like: the trained part, as the round began.
  """
  labeler, _ = claims.make_labeler(run, folder.parent)
  examples = claims.select_held_out_prompts(run)
  sampling = answering.SamplingSettings(
    run.config.data.prompt_len, run.config.data.response_len, run.config.claims.batch
  )

  def measure(step: int, params: Params) -> dict[str, Any]:
    policy = answering.Answerer(run, merge_params(base, params["policy"]), sampling)
    rows = claims.make_claim_rows(policy, examples, labeler)
    log.write_samples(step, rows[:MAX_LOGGED_ANSWERS])
    rates = claims.compute_claim_rates(rows, [])
    count, share = rates["claims"], rates["claims_denied"] or 0.0
    score = count * (1 - 2 * share) / len(examples)
    return {"step": step, "claims": count, "denied": share, "score": score}

  at = str(folder / "checkpoints")
  found = [measure(0, like)]
  for step in checkpoint.list_steps(at):
    found.append(measure(step, checkpoint.restore_saved_params(at, like, step)))
  log.print_table(
    f"{folder.name}: claims of greedy answers to {len(examples)} held-out prompts; "
    "the score is accepted less denied, of an answer",
    found,
  )
  # Of equals, the one that was trained longest.
  best = max(reversed(found[1:]), key=lambda row: row["score"])
  if best["score"] <= found[0]["score"]:
    log.print_note(
      f"{folder.name}: nothing is better than where the round began; take fewer "
      "rounds, or a lower dpo.optimizer.learning_rate"
    )
  chosen = {**best, "of": found}
  distributed.on_process_zero(lambda: write_json(folder / "selected.json", chosen))
  log.print_note(
    f"{folder.name}: step {best['step']} is taken, {best['denied']:.1%} denied"
  )
  return {"selected_step": best["step"], "held_out_denied": best["denied"]}


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs."""
  config, job = run.config.dpo, make_job(run, stage)
  ref = merge_params(job.frozen["policy"], job.params["policy"])
  (learns,) = job.passes[UPDATE]
  # Once for each pair, where training passes over them again and again.
  reference = DeviceFunction(
    "reference",
    _pair_logps(run.policy, config.shared_prefix, config.chunk),
    lambda: (ref, job.batch_spec.pairs),
    {"": [learns._replace(phase="forward", role="ref", parts=1)]},
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
