"""Runs a recipe: its stages in order; skips what is done, resumes the rest."""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import find_differences, read_json, write_json
from vlmrlaif_jax.core.interrupts import StageMonitor
from vlmrlaif_jax.core.profiling import ProfilerTrace
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.planner import memory
from vlmrlaif_jax.recipes import validation
from vlmrlaif_jax.recipes.validation import list_stages
from vlmrlaif_jax.report import page
from vlmrlaif_jax.runtime import loading, resume_policy
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.stage import (
  format_title,
  get_stage,
  list_policy_stages,
  load_stages,
  write_facts,
)
from vlmrlaif_jax.training import checkpoint


def run_recipe(
  config: ConfigDict,
  workdir: str,
  stop: Callable[[], bool] = lambda: False,
  traced: range = range(0),
) -> pathlib.Path:
  """Runs the stages that are not done yet, writes the report, and returns its path.

  Args:
    stop: whether to end now; asked between steps.
    traced: steps of each stage that a trace is written of.

  Raises:
    Stopped: it was to end; what is done is kept.
  """
  root = pathlib.Path(workdir).absolute()
  distributed.check_same_config(config.to_json_best_effort())
  if distributed.is_multiprocess():
    kind = jax.devices()[0].device_kind
    distributed.print_once(
      f"{jax.process_count()} processes with {jax.device_count()} devices ({kind}), "
      f"{jax.local_device_count()} of them here"
    )
  stages = list_stages(config)
  validation.check_recipe(config)
  distributed.on_process_zero(lambda: check_workdir(config, root))
  # What was compiled for one run serves all that stand beside it, or all that share the
  # folder of JAX_COMPILATION_CACHE_DIR.
  if jax.config.values["jax_compilation_cache_dir"] is None:
    jax.config.update("jax_compilation_cache_dir", str(root.parent / ".jax_cache"))
  todo = [s for s in stages if not is_done(config, root, s)]
  for stage in stages:
    if stage not in todo:
      distributed.print_once(f"{stage}: done before, skipped")
  if todo:
    try:
      memory.check_memory(config, todo)
      made = loading.create_run(config, root, watch=StageMonitor(stop))
    # Errors of the data or the model that the config names.
    except ValueError as error:
      raise UserError(str(error)) from error
    with jax.set_mesh(made.mesh):  # Kernels find it: attention._attend_splash.
      for stage in todo:
        _run_stage(made, stage, root / stage, stop, traced)
  path = pathlib.Path(distributed.on_process_zero(lambda: str(page.write_report(root))))
  distributed.print_once(f"report: {path}")
  return path


def _run_stage(
  made: Run,
  stage: str,
  folder: pathlib.Path,
  stop: Callable[[], bool],
  traced: range,
) -> None:
  start = time.monotonic()
  entry = get_stage(stage)
  resumed = checkpoint.get_latest_step(str(folder / "checkpoints"))
  steps, writes = entry.count_steps(made), distributed.is_process_zero()
  policies = list_policy_stages(made.workdir)
  with (
    StageLog(folder, stage, steps, resume_from=resumed, writes=writes) as log,
    ProfilerTrace(traced, str(folder / "trace"), log.print_note) as trace,
  ):
    distributed.on_process_zero(
      lambda: write_facts(
        folder,
        format_title(stage),
        has_rollouts=entry.has_rollouts,
        is_measurement=entry.is_measurement,
      )
    )
    watch = StageMonitor(stop, trace.step)
    watch.check(f"the run stands before {stage}")
    summary = entry.run(made._replace(watch=watch), stage, folder, log)
    seconds = time.monotonic() - start
    log.print_note(f"{stage}: done in {seconds:.0f} s")
  done = {"seconds": round(seconds, 1), "summary": summary}
  if entry.is_measurement:
    before = _done(made.workdir, stage).get("measured", {})
    parts = dict.fromkeys(entry.parts(made.config), policies)
    done["measured"] = before | parts
  distributed.on_process_zero(lambda: write_json(folder / "done.json", done))


def _done(root: pathlib.Path, stage: str) -> dict[str, Any]:
  """The content of done.json, empty if there is none. Every process calls this."""
  path = root / stage / "done.json"
  return distributed.on_process_zero(lambda: read_json(path, default={}))


def is_done(config: ConfigDict, root: pathlib.Path, stage: str) -> bool:
  """Returns whether a stage has nothing left to do in a workdir.

  A measurement is done if all its parts have measured every policy that the workdir has
  now. Every process calls this.
  """
  done, entry = _done(root, stage), get_stage(stage)
  if not done or not entry.is_measurement:
    return bool(done)
  there, measured = set(list_policy_stages(root)), done.get("measured", {})
  return all(
    part in measured and there <= set(measured[part]) for part in entry.parts(config)
  )


# What else is in the workdir.


def check_workdir(config: ConfigDict, root: pathlib.Path) -> None:
  """Writes config.json, if no stage in the workdir ran under another config.

  Settings of stages that have not begun may change, and so may settings that no result
  depends on; see resume_policy.FREE. A recipe has the sections of its own stages only:
  sections that an earlier recipe has left in config.json stay there.

  Raises:
    UserError: lists each setting that has changed, with both values.
  """
  path = root / "config.json"
  now = json.loads(config.to_json_best_effort()) | {"stages": list_stages(config)}
  before = read_json(path) if path.exists() else {}
  if before:
    known = [s for s in (*load_stages(), *list_stages(config)) if (root / s).exists()]
    begun = {get_stage(stage).section for stage in known}
    fixed = begun | {"seed", "model", "data"} if begun else set()
    if (root / "world").exists():  # It is rendered once.
      fixed |= {"seed", "data"}
    changed = [
      f"  {key}: {old!r} there, {new!r} now"
      for key, (old, new) in sorted(find_differences(before, now).items())
      if key.split(".")[0] in fixed & now.keys() and not resume_policy.is_free(key)
    ]
    if changed:
      raise UserError(
        f"{root} holds a run under another config:\n"
        + "\n".join(changed)
        + "\nGive another --workdir, or the old values; or remove the folders of the "
        "stages that are to be run again."
      )
  root.mkdir(parents=True, exist_ok=True)
  write_json(path, before | now)
