"""Runs a recipe: python launch/run.py --config=configs/ppo.py[:preset] --workdir=DIR.

Set any value of the recipe with --config.SECTION.NAME=VALUE. Stages that are done in
the workdir are skipped. A killed stage resumes from its last checkpoint. On SIGTERM or
Ctrl-C a stage finishes its step and saves, and the program exits with code 75. A second
signal ends the program immediately. Exit code 3 means that an alarm stopped the run.
docs/settings.md lists all settings. --trace=3-5 writes a profile of these steps.

On several hosts that share the workdir, start the program on each of them with
--coordinator, --processes and --process. On a TPU pod, under Slurm and under Open MPI
these values are detected.
"""

import difflib
import importlib.util
import itertools
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Recipes import each other as configs.NAME.

from absl import app, flags, logging  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from launch import failures, supervisor  # noqa: E402
from vlmrlaif_jax.core.files import flatten_settings  # noqa: E402
from vlmrlaif_jax.planner import topologies  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: FILE[:PRESET].")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of all outputs of the run.")
TRACE = flags.DEFINE_string(
  "trace", "", 'Steps of each stage to profile: "3" or "3-5"; "" for none.'
)
COORDINATOR = flags.DEFINE_string(
  "coordinator",
  os.environ.get("JAX_COORDINATOR_ADDRESS"),
  "HOST:PORT of process 0 in a run of several processes. The default is the "
  "environment variable JAX_COORDINATOR_ADDRESS.",
)
PROCESSES = flags.DEFINE_integer(
  "processes",
  os.environ.get("JAX_NUM_PROCESSES"),
  "Number of processes. The default is JAX_NUM_PROCESSES.",
)
PROCESS = flags.DEFINE_integer(
  "process",
  os.environ.get("JAX_PROCESS_ID"),
  "Index of this process, from 0. The default is JAX_PROCESS_ID.",
)
HEARTBEAT_S = flags.DEFINE_integer(
  "heartbeat_s", 30, "Seconds of silence after which a process counts as dead.", 5
)
START_S = flags.DEFINE_integer(
  "start_s", 300, "Seconds within which all processes must connect.", 1
)

# Words of TRL's configs -> names of settings here, as suffixes of dotted names.
TRL_NAMES = {
  "num_generations": ("samples",),
  "beta": ("kl_coef", "dpo.beta"),
  "max_completion_length": ("data.response_len",),
  "max_prompt_length": ("data.prompt_len",),
  "learning_rate": ("optimizer.learning_rate",),
  "per_device_train_batch_size": ("batch_size",),
  "gradient_accumulation_steps": ("microbatches",),
}
MAX_SUGGESTIONS = 4


def main(argv: list[str]) -> None:
  """Runs the recipe of the flags, and exits with the code of its outcome."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)  # Libraries log too many details.
  from vlmrlaif_jax.core import interrupts
  from vlmrlaif_jax.core.errors import UserError, make_printable
  from vlmrlaif_jax.training import alarms

  stop = interrupts.StopSignal(agreed=lambda flag: distributed.any_process(flag))
  stop.install()
  # These imports take seconds, during which a signal must have an effect.
  from vlmrlaif_jax.core import distributed
  from vlmrlaif_jax.recipes import machine_faults, runner

  failures.install_handlers()
  several, workdir = supervisor.is_child(), pathlib.Path(WORKDIR.value)
  try:
    if several:
      connect_processes()
    topologies.init_backend()
    run = runner.run_recipe
    if CONFIG.value.recipe == "pretrain":  # The package does not contain this stage.
      from tools.pretraining import program

      run = program.run
    traced = parse_trace(TRACE.value)
    run(CONFIG.value, WORKDIR.value, stop, traced, on_taken=failures.end_taken_run)
  except interrupts.Stopped as stopped:
    if distributed.is_process_zero():
      why = stop.signal or "stopped"
      print(f"{why}: {stopped}; the same command resumes the run", flush=True)
    sys.exit(interrupts.EXIT_RESUMABLE)
  except alarms.AlarmError as alarmed:
    if distributed.is_process_zero():
      print(f"error: {alarmed}", file=sys.stderr, flush=True)
    sys.exit(alarms.EXIT_ALARM)
  except Exception as error:
    failure = machine_faults.describe_failure(error, workdir)
    if failure:
      print(make_printable(f"error: {failure[0]}"), file=sys.stderr, flush=True)
    elif several:
      traceback.print_exc()
    code = failure[1] if failure else 1
    if several:
      distributed.abort_process(
        error,
        code=code,
        heartbeat_s=HEARTBEAT_S.value,
        note=lambda: note_own_error(workdir, error),
      )
    if not failure:
      raise
    if not isinstance(error, UserError):
      # Threads of Orbax that wait for the disk would end a normal exit in tracebacks.
      sys.stdout.flush()
      os._exit(code)
    sys.exit(code)


def note_own_error(workdir: pathlib.Path, error: Exception) -> None:
  """Notes an error of this process, unless the workdir is another run's."""
  from vlmrlaif_jax.core import distributed
  from vlmrlaif_jax.recipes import process_errors, workdir_lock

  if not isinstance(error, workdir_lock.WorkdirInUse):
    process_errors.note_error(workdir, distributed.process_index(), error)


def connect_processes() -> None:
  """Connects this process to the others of the run that the flags describe."""
  from vlmrlaif_jax.core import distributed  # The import takes seconds.

  supervisor.end_with_parent()
  place = parse_processes(flags.FLAGS)
  print(
    f"waiting for all processes, at most --start_s={START_S.value} s",
    file=sys.stderr,
    flush=True,
  )
  distributed.connect_processes(
    *place, heartbeat_s=HEARTBEAT_S.value, start_s=START_S.value
  )


def exit_with_error(message: str) -> NoReturn:
  """Prints an error and exits with code 2."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def parse_trace(text: str) -> range:
  """Parses the steps of --trace: "3", "3-5", or "" for none."""
  if not text:
    return range(0)
  first, _, last = text.partition("-")
  if first.isdecimal() and (last or first).isdecimal():
    steps = range(int(first), int(last or first) + 1)
    if steps:
      return steps
  exit_with_error(f'--trace must be a step, as "3", or a range, as "3-5", not {text!r}')


def parse_processes(
  values: flags.FlagValues,
) -> tuple[str | None, int | None, int | None]:
  """Returns (coordinator, processes, process); JAX detects values that are None."""
  place = values.coordinator, values.processes, values.process
  known = None not in place and 0 <= values.process < values.processes
  alone = values.processes in (None, 1) and values.process in (None, 0)
  if known or alone or supervisor.is_in_cluster(os.environ):
    return place
  exit_with_error(
    f"--coordinator={place[0]} --processes={place[1]} --process={place[2]}: "
    "give all three, and --process from 0 to one below --processes"
  )


def supervise(argv: list[str]) -> None:
  """Runs this command as a child if there are several processes; exits like it."""
  # Only these flags are parsed, because the flag of the config would load the recipe.
  own = flags.FlagValues()
  for flag in (WORKDIR, COORDINATOR, PROCESSES, PROCESS):
    own[flag.name] = flags.FLAGS[flag.name]
  own(argv, known_only=True)
  count = parse_processes(own)[1]
  several = count > 1 if count is not None else supervisor.is_in_cluster(os.environ)
  if own.workdir and several:
    folder = pathlib.Path(own.workdir)
    sys.exit(supervisor.run_child(sys.orig_argv, folder))


def check_overrides(argv: list[str]) -> None:
  """Checks the settings on the command line against those of the recipe.

  Exits with an error for an unknown --config.KEY, and for a setting without "--config."
  such as --ppo.kl_coef=0.1 or ppo.kl_coef=0.1. The error suggests known settings.

  Args:
    argv: Arguments of the program.
  """
  recipes = [a.split("=", 1)[1] for a in argv if a.startswith("--config=")]
  recipes += [b for a, b in itertools.pairwise(argv) if a == "--config"]
  if not recipes:
    return
  keys = sorted(flatten_settings(load_recipe(recipes[-1]).to_dict()))
  for before, argument in itertools.pairwise(["", *argv]):
    name, equals, value = argument.partition("=")
    if name.startswith("--config."):
      key = name.removeprefix("--config.")
      if key not in keys:
        hint = suggest_settings(key, keys)
        exit_with_error(f"{recipes[-1]} has no setting {key!r}{hint}")
    elif is_bare_setting(before, argument, keys):
      key = name.removeprefix("--")
      flag = f"; did you mean --config.{key}{equals}{value}?"
      hint = flag if key in keys else suggest_settings(key, keys)
      exit_with_error(f'{argument!r} must start with "--config."{hint}')


def is_bare_setting(before: str, argument: str, keys: Sequence[str]) -> bool:
  """Returns whether an argument is a setting that lacks "--config.".

  Args:
    before: The preceding argument, of which this one may be the value.
    argument: The argument.
    keys: Dotted names of the recipe's settings.
  """
  name, equals, _ = argument.removeprefix("--").partition("=")
  root = name.split(".")[0]
  is_section = root in {key.split(".")[0] for key in keys}
  if argument.startswith("--"):
    return is_section and root not in flags.FLAGS
  is_value = before.startswith("--") and "=" not in before
  return bool(equals) and not is_value and (is_section or "." in name)


def suggest_settings(key: str, keys: Sequence[str]) -> str:
  """Returns the end of an error about an unknown setting: settings that may be meant.

  Args:
    key: Dotted name of the unknown setting.
    keys: Dotted names of the recipe's settings.
  """
  from vlmrlaif_jax.recipes import validation  # The import takes seconds.

  if new_name := validation.get_new_name(key):
    return f"; it is now --config.{new_name}"
  section, _, last = key.rpartition(".")
  suffixes = tuple(f".{name}" for name in TRL_NAMES.get(last, ()))
  near = [name for name in keys if suffixes and f".{name}".endswith(suffixes)]
  near = [name for name in near if name.startswith(f"{section}.")] or near
  near = near or difflib.get_close_matches(key, keys, n=3, cutoff=0.4)
  names = " or ".join(f"--config.{name}" for name in near[:MAX_SUGGESTIONS])
  return f"; did you mean {names}?" if near else ""


def load_recipe(chosen: str) -> ConfigDict:
  """Loads the config of FILE[:PRESET], or exits with an error."""
  path, _, preset = chosen.partition(":")
  if not pathlib.Path(path).exists():
    names = list_recipes()
    near = f"configs/{pathlib.Path(path).stem}.py"
    hint = f"; did you mean {near}?" if pathlib.Path(near).name in names else ""
    exit_with_error(f"no recipe at {path}; configs/ contains {', '.join(names)}{hint}")
  spec = importlib.util.spec_from_file_location("recipe_file", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    return module.get_config(preset) if preset else module.get_config()
  except ValueError as error:
    exit_with_error(str(error))


def list_recipes() -> list[str]:
  """Lists the files in configs/ that have presets, which other files do not."""
  paths = sorted((ROOT / "configs").glob("*.py"))
  return [path.name for path in paths if "def get_config(preset" in path.read_text()]


if __name__ == "__main__":
  # The environment must be set before recipes import jax.
  if not topologies.has_accelerator():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ["LIBTPU_INIT_ARGS"] = topologies.make_libtpu_arguments(os.environ)
  if not supervisor.is_child():
    supervise(sys.argv)
  topologies.import_jax()
  flags.mark_flags_as_required(["config", "workdir"])
  check_overrides(sys.argv[1:])
  app.run(main)
