"""The runner of recipes: `run_recipe` runs the stages in order.

Stages that are done in the workdir are skipped. An unfinished stage resumes.
"""

import contextlib
import itertools
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
from vlmrlaif_jax.recipes import (
  compilation_cache,
  data_files,
  memory_faults,
  process_errors,
  stage_outputs,
  validation,
  workdir_lock,
)
from vlmrlaif_jax.recipes.validation import ROUND_STAGE, list_stages
from vlmrlaif_jax.report import page
from vlmrlaif_jax.runtime import loading, resume_policy
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.stage import (
  format_title,
  get_stage,
  list_policy_stages,
  load_stages,
  read_start,
  write_facts,
)
from vlmrlaif_jax.training import checkpoint

MEASURED = "measured_policies"  # Key of done.json: the policies of each part.
CONFIG_REMEDY = (
  "restore it from a copy, or remove it if this command has the settings of the run"
)


def run_recipe(
  config: ConfigDict,
  workdir: str,
  stop: Callable[[], bool] = lambda: False,
  traced: range = range(0),
  on_taken: Callable[[UserError], None] = lambda error: None,
) -> pathlib.Path:
  """Runs the unfinished stages, writes the report and returns the report's path.

  Args:
    config: The recipe.
    workdir: Folder of all outputs.
    stop: Returns whether to stop now; called between steps.
    traced: Steps of each stage for which a profiler trace is written.
    on_taken: Called in a thread when another run has taken over the workdir; see
      hold_workdir.

  Raises:
    Stopped: `stop` returned True. Finished steps are saved.
    UserError: A setting, a file or the workdir does not fit, or another run uses the
      workdir.
  """
  root = pathlib.Path(workdir).absolute()
  validation.check_workdir_path(root)
  distributed.check_same_config(config.to_json_best_effort())
  validation.check_recipe(config)
  validation.check_no_links(root, list_stages(config))
  with contextlib.ExitStack() as stack:
    check_lock = lock_workdir(root, stack, on_taken)

    def check_and_stop() -> bool:
      check_lock()
      return stop()

    try:
      _run_stages(config, root, check_and_stop, traced)
    except Exception:
      check_lock()  # If the workdir was removed, this is the cause.
      raise
    write = lambda: check_lock() or str(page.write_report(root))
    path = pathlib.Path(distributed.on_process_zero(write))
  distributed.print_once(f"report: {path}")
  return path


def lock_workdir(
  root: pathlib.Path,
  stack: contextlib.ExitStack,
  on_taken: Callable[[UserError], None] = lambda error: None,
) -> Callable[[], None]:
  """Locks a workdir until the stack ends. Process 0 locks for all processes.

  It also removes notes of errors of earlier starts.

  Returns:
    A function that raises if the lock is lost.

  Raises:
    WorkdirInUse: Another run holds the workdir. Every process raises.
  """
  checks: list[Callable[[], None]] = []
  lock = workdir_lock.hold_workdir(root, distributed.print_once, on_taken=on_taken)

  def take() -> str:
    try:
      checks.append(stack.enter_context(lock))
    except workdir_lock.WorkdirInUse as error:
      return str(error)
    process_errors.forget_errors(root)
    return ""

  if refusal := distributed.on_process_zero(take):
    raise workdir_lock.WorkdirInUse(refusal)
  return checks[0] if checks else lambda: None


def _run_stages(
  config: ConfigDict, root: pathlib.Path, stop: Callable[[], bool], traced: range
) -> None:
  """Runs the unfinished stages in a locked workdir; see run_recipe."""
  if distributed.is_multiprocess():
    kind = jax.devices()[0].device_kind
    distributed.print_once(
      f"{jax.process_count()} processes with {jax.device_count()} devices ({kind}), "
      f"{jax.local_device_count()} of them on this process"
    )
  stages = list_stages(config)
  is_begun = distributed.on_process_zero(lambda: check_workdir(config, root))
  compilation_cache.use_private_cache()
  distributed.on_process_zero(
    lambda: stage_outputs.set_damaged_aside(root, stages, distributed.print_once)
  )
  todo = [s for s in stages if not is_done(config, root, s)]
  for stage in stages:
    if stage not in todo:
      distributed.print_once(f"{stage}: already done, skipped")
  for stage in config.stages:
    if stage not in (*stages, ROUND_STAGE):
      distributed.print_once(
        f"{stage}: skipped, because no later stage reads its results"
      )
  if todo:
    try:
      memory.check_memory(config, todo)
      with memory_faults.explain_exhaustion(config, ""):
        run = loading.create_run(config, root, watch=StageMonitor(stop))
      data_files.check_videos(run, is_begun=is_begun)
    # The data or the model of the config is invalid, or lacks a file.
    except (ValueError, FileNotFoundError) as error:
      raise UserError(str(error)) from error
    with jax.set_mesh(run.mesh):  # attention._attend_splash reads this mesh.
      for stage in todo:
        # Stages read files hours after the start of the run.
        distributed.on_process_zero(
          lambda: data_files.check_unchanged(root, data_files.hash_data_files(config))
        )
        _resume_stage(run, stage, root / stage, stop, traced)


def _resume_stage(
  run: Run,
  stage: str,
  folder: pathlib.Path,
  stop: Callable[[], bool],
  traced: range,
) -> None:
  """Runs a stage; a damaged checkpoint of its own is set aside, and it runs again."""
  try:
    _run_stage(run, stage, folder, stop, traced)
  except checkpoint.DamagedCheckpoint as error:
    step = pathlib.Path(error.folder)
    is_own = step.parent == folder / "checkpoints" and step.exists()
    if not is_own or distributed.is_multiprocess():
      raise
    print(
      f"{error}\n{stage}: set aside as {folder / step.name}.damaged; the stage "
      "continues from the checkpoint before, or from its start",
      flush=True,
    )
    # Not next to the other steps, because Orbax reads every folder there.
    stage_outputs.set_aside(step, folder)
    _resume_stage(run, stage, folder, stop, traced)


def _run_stage(
  run: Run,
  stage: str,
  folder: pathlib.Path,
  stop: Callable[[], bool],
  traced: range,
) -> None:
  start = time.monotonic()
  entry = get_stage(stage)
  resumed = checkpoint.get_latest_step(str(folder / "checkpoints"))
  steps, writes = entry.count_steps(run), distributed.is_process_zero()
  policies = _find_policies(run.workdir)
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
    distributed.on_process_zero(lambda: stage_outputs.forget_outputs(folder))
    watch = StageMonitor(stop, trace.step)
    watch.check(f"the next stage is {stage}")
    with memory_faults.explain_exhaustion(run.config, stage):
      summary = entry.run(run._replace(watch=watch), stage, folder, log)
    stop()  # Raises if the workdir was removed, so that no result of it counts as done.
    seconds = time.monotonic() - start
    log.print_note(f"{stage}: done in {seconds:.0f} s")
  done = {"seconds": round(seconds, 1), "summary": summary}
  if entry.is_measurement:
    before = _read_done(run.workdir, stage).get(MEASURED, {})
    parts = dict.fromkeys(entry.parts(run.config), policies)
    done[MEASURED] = before | parts
  distributed.on_process_zero(
    lambda: write_json(
      folder / "done.json", done | {"files": stage_outputs.hash_outputs(folder)}
    )
  )


def _read_done(root: pathlib.Path, stage: str) -> dict[str, Any]:
  """Returns the content of done.json, {} if missing. Every process must call it."""
  path = root / stage / "done.json"
  return distributed.on_process_zero(lambda: read_json(path, default={}))


def _find_policies(root: pathlib.Path) -> dict[str, float]:
  """Returns the start of each policy's training, which identifies it, by stage.

  Every process must call it.
  """
  stages = list_policy_stages(root)
  return distributed.on_process_zero(
    lambda: {stage: read_start(root / stage) for stage in stages}
  )


def is_done(config: ConfigDict, root: pathlib.Path, stage: str) -> bool:
  """Returns whether a stage is finished in a workdir. Every process must call it.

  A measurement is finished if all its parts have measured every current policy of the
  workdir. A policy that was trained again is another one.
  """
  done, entry = _read_done(root, stage), get_stage(stage)
  if not done or not entry.is_measurement:
    return bool(done)
  policies, measured = _find_policies(root), done.get(MEASURED, {})
  return all(
    part in measured and policies.items() <= measured[part].items()
    for part in entry.parts(config)
  )


# The config of the workdir.


def check_workdir(config: ConfigDict, root: pathlib.Path) -> bool:
  """Writes config.json and data.json after a comparison with those of earlier stages.

  Settings and files of stages that have not started may change. So may settings that do
  not affect results; see resume_policy.FREE_SETTINGS. So may a server that no stage
  has queried. Files are compared by content, so
  that they may be moved. Sections of earlier recipes stay in config.json, because a
  recipe contains only the sections of its own stages.

  Returns:
    Whether a stage has begun.

  Raises:
    UserError: A fixed setting or the content of a file has changed. The message lists
      each with both values.
  """
  path = root / "config.json"
  now = json.loads(config.to_json_best_effort()) | {"stages": list_stages(config)}
  before = stage_outputs.read_workdir_object(path, CONFIG_REMEDY)
  hashes = data_files.hash_data_files(config)
  stored = stage_outputs.read_workdir_object(
    root / data_files.HASH_FILE, "remove it if no file of the data has changed"
  )
  known = [s for s in (*load_stages(), *list_stages(config)) if (root / s).exists()]
  begun = [get_stage(stage) for stage in known] if before else []
  fixed = {stage.section for stage in begun}
  if begun:
    fixed |= {"seed", "model", "data"}
  # The reward is of no stage alone.
  sections = [each.reads(config) for each in begun if each.section in config]
  fixed |= {"reward"} & set(itertools.chain(*sections))
  if before and (root / "world").exists():  # The embedded world is rendered once.
    fixed |= {"seed", "data"}
  changed = [
    f"  --config.{key}: {old!r} in the workdir, {new!r} now"
    for key, (old, new) in sorted(find_differences(before, now).items())
    if key.split(".")[0] in fixed & now.keys()
    and not resume_policy.is_free(key)
    and not resume_policy.is_unused_server(key, before)
    and not data_files.is_unmoved_content(key, stored, hashes)
  ]
  if changed:
    raise UserError(
      f"{root} contains a run with another config:\n"
      + "\n".join(changed)
      + "\nUse another --workdir or the old values, or remove the folders of the "
      "stages that must run again."
    )
  # A stage may read the files of another section.
  reading = [stage for stage in begun if stage.section in config]
  fixed |= {section for stage in reading for section in stage.reads(config)}
  data_files.check_unchanged(root, hashes, fixed)
  root.mkdir(parents=True, exist_ok=True)
  write_json(path, before | now)
  data_files.write_hashes(root, hashes)
  return bool(begun)
