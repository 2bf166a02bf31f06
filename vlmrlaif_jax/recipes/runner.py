"""Runs a recipe: its stages in order; skips what is done, resumes the rest."""

import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.files import differing, read_json, write_json
from vlmrlaif_jax.core.interrupts import Watch
from vlmrlaif_jax.core.profiling import Trace
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.stage_names import split_round
from vlmrlaif_jax.planner import memory
from vlmrlaif_jax.recipes import validation
from vlmrlaif_jax.recipes.validation import RecipeError
from vlmrlaif_jax.report import page
from vlmrlaif_jax.runtime import resume_policy, role_params, scoring
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.evaluation import abilities, benchmarks, evaluate, judges
from vlmrlaif_jax.stages.labeling import claims, pairwise
from vlmrlaif_jax.stages.training import dpo, generative_rm, rl, supervised
from vlmrlaif_jax.training import checkpoint


class Stage(NamedTuple):
  """How a stage is run, and what of the config it depends on."""

  section: str  # Of the config.
  run: Callable[[Run, str, pathlib.Path, Log], dict[str, Any]]
  steps: Callable[[Run], int]  # For the progress line.


def _label(run, stage, folder, log):
  return pairwise.run_stage(run, role_params.policies(run)["sft"], folder, log)


def _evaluate(run, stage, folder, log):
  policies = role_params.policies(run)
  reward = None
  if role_params.has_reward_model(run):
    reward = functools.partial(
      scoring.score_texts, run, role_params.reward_variables(run)
    )
  return evaluate.run_stage(run, policies, reward, folder, log)


STAGES = {
  "sft_short": Stage("sft", supervised.sft, lambda run: run.config.sft.short_steps),
  "sft_long": Stage("sft", supervised.sft, lambda run: run.config.sft.long_steps),
  "label": Stage("label", _label, pairwise.total_steps),
  "rm": Stage("rm", supervised.rm, lambda run: run.config.rm.steps),
  "ppo": Stage("ppo", rl.ppo, lambda run: run.config.ppo.steps),
  "claims": Stage("claims", claims.run_stage, claims.total_steps),
  "dpo": Stage("dpo", dpo.run_stage, lambda run: run.config.dpo.steps),
  "grpo": Stage("grpo", rl.grpo, lambda run: run.config.grpo.steps),
  "grm_sft": Stage(
    "grm_sft", generative_rm.grm_sft, lambda run: run.config.grm_sft.steps
  ),
  "grm": Stage("grm", generative_rm.grm, lambda run: run.config.grm.steps),
  "judges": Stage("judges", judges.run_stage, judges.total_steps),
  "eval": Stage("evaluate", _evaluate, evaluate.total_steps),
  "abilities": Stage("label", abilities.run_stage, abilities.total_steps),
  "benchmarks": Stage("benchmarks", benchmarks.run_stage, benchmarks.total_steps),
}
ROUND = "round"  # In a recipe's stages: "claims_N" and "dpo_N" for each of its rounds.


def stage_of(name: str) -> Stage:
  """The entry of a stage, which may be of a round: "dpo_2" is a "dpo"."""
  return STAGES[split_round(name)[0]]


def stages_of(config: ConfigDict) -> list[str]:
  """The stages of a recipe by name, its rounds written out.

  Raises:
    RecipeError: a stage that there is not.
  """
  of_rounds = [
    f"{name}_{number}"
    for number in range(1, config.rounds + 1)
    for name in ("claims", "dpo")
  ]
  named = []
  for stage in config.stages:
    if stage not in (*STAGES, ROUND):
      known = (*STAGES, ROUND)
      raise RecipeError(f"stages must be of {known}, not {stage!r}")
    named += of_rounds if stage == ROUND else [stage]
  return named


def sections(config: ConfigDict) -> set[str]:
  """The sections of the config that its stages read."""
  return {stage_of(stage).section for stage in stages_of(config)}


def run(
  config: ConfigDict,
  workdir: str,
  stop: Callable[[], bool] = lambda: False,
  traced: range = range(0),
) -> pathlib.Path:
  """Runs what is not done yet, writes the report, and returns its path.

  Args:
    stop: whether to end now; asked between steps.
    traced: steps of each stage that a trace is written of.

  Raises:
    Stopped: it was to end; what is done is kept.
  """
  root = pathlib.Path(workdir).absolute()
  distributed.check_same("the config", config.to_json_best_effort())
  if distributed.several():
    kind = jax.devices()[0].device_kind
    distributed.tell(
      f"{jax.process_count()} processes with {jax.device_count()} devices ({kind}), "
      f"{jax.local_device_count()} of them here"
    )
  stages = stages_of(config)
  validation.check(config, sections(config))
  distributed.once(lambda: check_workdir(config, root))
  # What was compiled for one run serves all that stand beside it.
  jax.config.update("jax_compilation_cache_dir", str(root.parent / ".jax_cache"))
  todo = distributed.once(lambda: [s for s in stages if not _done(root, s).exists()])
  for stage in stages:
    if stage not in todo:
      distributed.tell(f"{stage}: done before, skipped")
  if todo:
    try:
      memory.refuse(config, todo)
      made = run_lib.make(config, root, watch=Watch(stop))
    # Of the data or the model that the config names, or of the devices there are.
    except (ValueError, memory.TooLarge) as error:
      raise RecipeError(str(error)) from error
    with jax.set_mesh(made.mesh):  # Kernels find it: attention._splash, quant._pallas.
      for stage in todo:
        _run_stage(made, stage, root / stage, stop, traced)
  path = pathlib.Path(distributed.once(lambda: str(page.write_report(root))))
  distributed.tell(f"report: {path}")
  return path


def _run_stage(
  made: Run,
  stage: str,
  folder: pathlib.Path,
  stop: Callable[[], bool],
  traced: range,
) -> None:
  start = time.monotonic()
  entry = stage_of(stage)
  resumed = checkpoint.latest_step(str(folder / "checkpoints"))
  steps, writes = entry.steps(made), distributed.is_first()
  with (
    Log(folder, stage, steps, resume_from=resumed, writes=writes) as log,
    Trace(traced, str(folder / "trace"), log.note) as trace,
  ):
    watch = Watch(stop, trace.step)
    watch.check(f"the run stands before {stage}")
    summary = entry.run(made._replace(watch=watch), stage, folder, log)
    seconds = time.monotonic() - start
    log.note(f"{stage}: done in {seconds:.0f} s")
  done = {"seconds": round(seconds, 1), "summary": summary}
  distributed.once(lambda: write_json(_done(made.workdir, stage), done))


def _done(root: pathlib.Path, stage: str) -> pathlib.Path:
  return root / stage / "done.json"


# What else is in the workdir.


def check_workdir(config: ConfigDict, root: pathlib.Path) -> None:
  """Refuses a workdir whose finished or begun stages ran under another config.

  Settings of stages that have not begun may still change, and so may all that no
  result depends on; see free.FREE.
  """
  path = root / "config.json"
  now = json.loads(config.to_json_best_effort()) | {"stages": stages_of(config)}
  if path.exists():
    known = [s for s in (*STAGES, *stages_of(config)) if (root / s).exists()]
    begun = {stage_of(stage).section for stage in known}
    fixed = begun | {"seed", "model", "data"} if begun else set()
    if (root / "world").exists():  # It is rendered once.
      fixed |= {"seed", "data"}
    before = read_json(path)
    changed = [
      f"  {key}: {old!r} there, {new!r} now"
      for key, (old, new) in sorted(differing(before, now).items())
      if key.split(".")[0] in fixed and not resume_policy.is_free(key)
    ]
    if changed:
      raise RecipeError(
        f"{root} holds a run under another config:\n"
        + "\n".join(changed)
        + "\nGive another --workdir, or the old values; or remove the folders of the "
        "stages that are to be run again."
      )
  root.mkdir(parents=True, exist_ok=True)
  write_json(path, now)
