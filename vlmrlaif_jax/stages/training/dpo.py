"""PROGRAM: DPO of the policy on preferences, once or in rounds (2405.17220, 2.3).

The reference is the policy that a round starts with. What it thinks of the pairs is
computed once and kept beside the round, under a name made of its weights and the pairs:
that of another model is never read.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from vlmrlaif_jax.core import distributed, resumable, sharding
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import ComparedPairs, Params, Parts, join
from vlmrlaif_jax.data.records import PreferenceExample, chosen_and_rejected
from vlmrlaif_jax.methods import dpo as method
from vlmrlaif_jax.runtime import answering, role_params, scoring, video_features
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.labeling import claims
from vlmrlaif_jax.stages.training import common, packed_batches
from vlmrlaif_jax.training import checkpoint

# Which checkpoint a round leaves: its last, or the one whose answers to held-out
# prompts make the most claims that the labeler accepts, less those that it denies. The
# share denied alone would choose what says the least.
SELECT = ("last", "claims")
SHOWN = 24  # Held-out prompts whose answers are kept of each checkpoint.


def run_stage(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Trains on the preferences given, on those of its round, or of the label stage."""
  config = run.config.dpo
  if config.select not in SELECT:
    raise ValueError(f"dpo.select must be one of {SELECT}, not {config.select!r}")
  pairs = common.preferences(run, _source(run, stage), log, least=config.batch_size)
  params, frozen = role_params.policy_roles(run, role_params.start_of(stage))
  ref_logps = reference_logps(run, frozen["ref"], pairs, folder / "ref_logps.jsonl")

  def plain(step: int) -> ComparedPairs:
    rows = common.order_of(run, len(pairs), config.batch_size, step)
    rows = rows[distributed.mine(len(rows), run.mesh)]
    compared = ComparedPairs(scoring.pairs_batch(run, pairs, rows), ref_logps[rows])
    return sharding.put(compared, run.mesh)

  common.fit(
    run,
    stage,
    folder,
    log,
    config,
    method.make(config, Parts(policy=run.policy)),
    steps=config.steps,
    params=params,
    frozen={"policy": frozen["policy"]},
    data=packed_data(run, log, pairs, ref_logps) if config.pack_len else plain,
  )
  summary = {"pairs": len(pairs)}
  if config.select == "claims":
    summary |= select(run, frozen["policy"], params, folder, log)
  return summary


def packed_data(
  run: Run,
  log: Log,
  pairs: Sequence[PreferenceExample],
  ref_logps: Float[np.ndarray, "pairs 2"],
) -> Callable[[int], ComparedPairs]:
  """From a step to its pairs, packed."""
  made = packed_batches.of_steps(
    run,
    "dpo",
    log,
    steps=run.config.dpo.steps,
    examples=pairs,
    sides=lambda numbers: scoring.pair_rows(run, pairs, numbers),
  )

  def data(step: int) -> ComparedPairs:
    rows, numbers = made(step)
    return sharding.put(ComparedPairs(rows, ref_logps[numbers]), run.mesh)

  return data


def _source(run: Run, stage: str) -> str | pathlib.Path:
  """The file of preferences."""
  if run.config.dpo.preferences:
    return run.config.dpo.preferences
  made_by = (
    stage.replace(role_params.DPO, "claims") if stage != role_params.DPO else "label"
  )
  return run.workdir / made_by / "preferences.jsonl"


def reference_logps(
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
  logps_of = _pair_logps(run.policy, config.logps, config.shared_prefix, config.chunk)

  def make(block: range) -> list[dict[str, Any]]:
    rows = answering.filled_here(run, block, size)
    batch = sharding.put(scoring.pairs_batch(run, pairs, rows), run.mesh)
    made = distributed.fetch(logps_of(variables, batch))[: len(block)]
    return [
      {"id": pairs[i]["id"], "logps": logps.tolist()}
      for i, logps in zip(block, made, strict=True)
    ]

  told = [
    (pair["question"], *chosen_and_rejected(pair), pair.get("history"),
     video_features.features_of(run, pair["video"]))
    for pair in pairs
  ]  # fmt: skip
  lengths = (run.config.data.prompt_len, run.config.data.response_len)
  rows = resumable.kept_rows(
    path,
    run.watch.blocks(make),
    count=len(pairs),
    batch=size,
    fingerprint=resumable.fingerprint(
      variables, config.logps, lengths, run.template, told
    ),
  )
  return np.array([row["logps"] for row in rows], np.float32)


@functools.lru_cache
def _pair_logps(model, logps: str, shared_prefix: bool, chunk: int):
  """Compiled once for all rounds."""
  config = method.default_config()
  config.update(logps=logps, shared_prefix=shared_prefix, chunk=chunk)
  return jax.jit(
    lambda variables, pairs: method.pair_logps(config, model, variables, pairs)
  )


def select(
  run: Run, base: Params, like: Params, folder: pathlib.Path, log: Log
) -> dict[str, Any]:
  """Chooses a checkpoint on held-out prompts; writes selected.json, which is read by
  roles.policy_of. What is true plays no part in it: the labeler alone judges.

  Args:
    base: what the trained part is laid over.
    like: the trained part, as the round began.
  """
  labeler = claims.Labeler(run, folder.parent)
  examples = claims.held_out(run)
  sampling = answering.Sampling(
    run.config.data.prompt_len, run.config.data.response_len, run.config.claims.batch
  )

  def measure(step: int, params: Params) -> dict[str, Any]:
    replies = claims.ask(run, join(base, params["policy"]), examples, sampling)
    rows = claims.rows_of(examples, replies, labeler)
    log.samples(step, rows[:SHOWN])
    rates = claims.rates(rows, [])
    count, share = rates["claims"], rates["claims_denied"] or 0.0
    score = count * (1 - 2 * share) / len(examples)
    return {"step": step, "claims": count, "denied": share, "score": score}

  at = str(folder / "checkpoints")
  found = [measure(0, like)]
  for step in checkpoint.all_steps(at):
    found.append(measure(step, checkpoint.restore_params(at, like, step)))
  log.table(
    f"{folder.name}: claims of greedy answers to {len(examples)} held-out prompts; "
    "the score is accepted less denied, of an answer",
    found,
  )
  # Of equals, the one that was trained longest.
  best = max(reversed(found[1:]), key=lambda row: row["score"])
  if best["score"] <= found[0]["score"]:
    log.note(
      f"{folder.name}: nothing is better than where the round began; take fewer "
      "rounds, or a lower dpo.optimizer.learning_rate"
    )
  chosen = {**best, "of": found}
  distributed.once(lambda: write_json(folder / "selected.json", chosen))
  log.note(f"{folder.name}: step {best['step']} is taken, {best['denied']:.1%} denied")
  return {"selected_step": best["step"], "held_out_denied": best["denied"]}
