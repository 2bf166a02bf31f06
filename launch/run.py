"""Runs a recipe: python launch/run.py --config=configs/ppo.py[:preset] --workdir=DIR.

Any setting can be given as --config.SECTION.NAME=VALUE. Stages that are done in the
workdir are skipped, and one that was killed goes on where it was. On SIGTERM or Ctrl-C
a stage finishes its step, saves, and the program exits with code 75; a second signal
ends it at once. Code 3: an alarm has stopped it. --trace=3-5 writes a profile of these
steps of each stage. docs/settings.md lists all settings.

On several hosts that share the workdir, start it on each of them, with --coordinator,
--processes and --process; on a TPU pod, under Slurm or Open MPI it finds those out.
"""

import difflib
import importlib.util
import itertools
import os
import pathlib
import sys
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Recipes import each other as configs.NAME.

from absl import app, flags, logging  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from launch import supervisor  # noqa: E402
from vlmrlaif_jax.core.files import flatten_settings  # noqa: E402
from vlmrlaif_jax.planner import topologies  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe: FILE[:PRESET].")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of the run goes.")
TRACE = flags.DEFINE_string("trace", "", 'Steps to profile: "3", or "3-5".')
COORDINATOR = flags.DEFINE_string(
  "coordinator",
  os.environ.get("JAX_COORDINATOR_ADDRESS"),
  "HOST:PORT of process 0, where there are several; or JAX_COORDINATOR_ADDRESS.",
)
PROCESSES = flags.DEFINE_integer(
  "processes",
  os.environ.get("JAX_NUM_PROCESSES"),
  "How many there are; or JAX_NUM_PROCESSES.",
)
PROCESS = flags.DEFINE_integer(
  "process",
  os.environ.get("JAX_PROCESS_ID"),
  "Which one this is, from 0; or JAX_PROCESS_ID.",
)
HEARTBEAT_S = flags.DEFINE_integer(
  "heartbeat_s", 30, "Silence after which a process is taken for dead.", 5
)
START_S = flags.DEFINE_integer(
  "start_s", 300, "How long all processes may take to appear.", 1
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)  # Libraries tell more than anyone wants.
  from vlmrlaif_jax.core import interrupts
  from vlmrlaif_jax.core.errors import EXIT_USER_ERROR, UserError
  from vlmrlaif_jax.training import alarms

  stop = interrupts.StopSignal(agreed=lambda asked: distributed.any_process(asked))
  stop.install()
  from vlmrlaif_jax.core import distributed
  from vlmrlaif_jax.recipes import runner  # They take seconds.

  several, workdir = supervisor.is_child(), pathlib.Path(WORKDIR.value)
  try:
    if several:
      supervisor.end_with_parent()
      place = given(flags.FLAGS)
      print(
        f"waiting for all processes, at most --start_s={START_S.value} s",
        file=sys.stderr,
        flush=True,
      )
      distributed.connect_processes(
        *place, heartbeat_s=HEARTBEAT_S.value, start_s=START_S.value
      )
      distributed.on_process_zero(lambda: supervisor.forget_errors(workdir))
    run = runner.run_recipe
    if CONFIG.value.recipe == "pretrain":  # It makes what the package ships.
      from tools.pretraining import program

      run = program.run
    run(CONFIG.value, WORKDIR.value, stop, traced(TRACE.value))
  except interrupts.Stopped as stopped:
    if distributed.is_process_zero():
      why = stop.signal or "stopped"
      print(f"{why}: {stopped}; the same command goes on from there", flush=True)
    sys.exit(interrupts.EXIT_RESUMABLE)
  except alarms.AlarmError as alarmed:
    if distributed.is_process_zero():
      print(f"error: {alarmed}", file=sys.stderr, flush=True)
    sys.exit(alarms.EXIT_ALARM)
  except Exception as error:
    refused = isinstance(error, UserError)
    if refused:
      print(f"error: {error}", file=sys.stderr)
    elif several:
      traceback.print_exc()
    if several:
      distributed.abort_process(
        error,
        code=EXIT_USER_ERROR if refused else 1,
        heartbeat_s=HEARTBEAT_S.value,
        note=lambda: supervisor.note_error(workdir, distributed.process_index(), error),
      )
    if not refused:
      raise
    sys.exit(EXIT_USER_ERROR)


def traced(text: str) -> range:
  """The steps that --trace speaks of: "3", "3-5", or "" for none."""
  if not text:
    return range(0)
  first, _, last = text.partition("-")
  if first.isdecimal() and (last or first).isdecimal():
    steps = range(int(first), int(last or first) + 1)
    if steps:
      return steps
  print(
    f'error: --trace must be a step, as "3", or some, as "3-5", not {text!r}',
    file=sys.stderr,
  )
  sys.exit(2)


def given(values: flags.FlagValues) -> tuple[str | None, int | None, int | None]:
  """(coordinator, processes, process); JAX finds out what is None."""
  place = values.coordinator, values.processes, values.process
  known = None not in place and 0 <= values.process < values.processes
  alone = values.processes in (None, 1) and values.process in (None, 0)
  if known or alone or supervisor.in_cluster(os.environ):
    return place
  print(
    f"error: --coordinator={place[0]} --processes={place[1]} --process={place[2]}: "
    "give all three, and --process from 0 to one below --processes",
    file=sys.stderr,
  )
  sys.exit(2)


def supervise(argv: list[str]) -> None:
  """Ends in the exit code of a child, where this is one of several processes."""
  own = flags.FlagValues()  # Of these flags alone: that of the config would load it.
  for flag in (WORKDIR, COORDINATOR, PROCESSES, PROCESS):
    own[flag.name] = flags.FLAGS[flag.name]
  own(argv, known_only=True)
  count = given(own)[1]
  several = count > 1 if count is not None else supervisor.in_cluster(os.environ)
  if own.workdir and several:
    folder = pathlib.Path(own.workdir)
    sys.exit(supervisor.run(sys.orig_argv, folder))


def check_overrides(argv: list[str]) -> None:
  """Refuses --config.KEY=VALUE whose key the recipe does not have."""
  chosen = [a.split("=", 1)[1] for a in argv if a.startswith("--config=")]
  chosen += [b for a, b in itertools.pairwise(argv) if a == "--config"]
  if not chosen:
    return
  keys = sorted(flatten_settings(load(chosen[-1]).to_dict()))
  for argument in argv:
    if not argument.startswith("--config."):
      continue
    key = argument.removeprefix("--config.").split("=", 1)[0]
    if key not in keys:
      from vlmrlaif_jax.recipes import validation  # It takes seconds.

      near = difflib.get_close_matches(key, keys, n=3, cutoff=0.4)
      hint = f"; did you mean {' or '.join(near)}?" if near else ""
      if now := validation.get_new_name(key):
        hint = f"; it is now {now}"
      print(f"error: {chosen[-1]} has no setting {key!r}{hint}", file=sys.stderr)
      sys.exit(2)


def load(chosen: str) -> ConfigDict:
  """The config of FILE[:PRESET]."""
  path, _, preset = chosen.partition(":")
  if not pathlib.Path(path).exists():
    there = ", ".join(sorted(p.name for p in (ROOT / "configs").glob("*.py")))
    print(f"error: no recipe at {path}; in configs/ there are {there}", file=sys.stderr)
    sys.exit(2)
  spec = importlib.util.spec_from_file_location("recipe_file", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    return module.get_config(preset) if preset else module.get_config()
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  # To be said before recipes import jax.
  if not topologies.has_accelerator():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ["LIBTPU_INIT_ARGS"] = topologies.make_libtpu_arguments(os.environ)
  if not supervisor.is_child():
    supervise(sys.argv)
  flags.mark_flags_as_required(["config", "workdir"])
  check_overrides(sys.argv[1:])
  app.run(main)
