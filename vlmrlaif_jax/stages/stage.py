"""The declaration of a stage, and the table of all stages.

A module of stages/training, stages/labeling or stages/evaluation declares stages in a
tuple `STAGES`. No other registration is needed. The runner, the validation, the
planner, the report, the model card and the documentation read the table.
"""

import functools
import importlib
import pathlib
import pkgutil
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import check_at_least, subsection, user_errors
from vlmrlaif_jax.core.files import read_json, write_json
from vlmrlaif_jax.core.stage_log import StageLog, split_round
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.runtime.arrays import has_checkpoint
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.training import alarms
from vlmrlaif_jax.training import update as updates
from vlmrlaif_jax.training.job import TrainingSchedule

PACKAGES = ("training", "labeling", "evaluation")
# Minimum values of settings that several sections share, and of those of stages that
# train.
MIN_BATCH = dict(batch=1, block=1)
MIN_TRAINING = dict(
  **dict(batch_size=1, microbatches=1, minibatches=1, epochs=1, samples=1, slots=0),
  **dict(save_every=1, log_every=1, samples_every=1, keep=1),
  **dict(prompt_len=1, max_new=1, chunk=1, pack_len=0),
)
PREFERENCES = "a file of preferences, see docs/data.md"  # For `Stage.files`.


class RowSplit(NamedTuple):
  """The rows of a batch and the number of parts that they are divided into."""

  rows: int
  parts: int = 1  # Microbatches times minibatches.

  def is_divisible_by(self, shards: int) -> bool:
    """Returns whether each part divides into `shards` equal shards of rows."""
    return self.rows % (self.parts * shards) == 0


class Stage(NamedTuple):
  """A stage of a recipe."""

  name: str  # Entry of a recipe's `stages` and folder in the workdir.
  title: str  # Title in reports and model cards.
  section: str  # Section of the config.
  # Runs the stage: (run, name with its round, as "dpo_2", folder, log) -> summary for
  # done.json.
  run: Callable[[Run, str, pathlib.Path, StageLog], dict[str, Any]]
  # Raises UserError if a setting of the section is invalid; see check_settings.
  check: Callable[[ConfigDict], None] = lambda config: None
  # Setting of the section with the number of training steps; "" if it does not train.
  steps: str = ""
  # Total of the progress line of a stage that does not train.
  total_steps: Callable[[Run], int] = lambda run: 0
  # Whether other stages of the recipe use its results. A recipe skips a stage that is
  # not needed.
  is_needed: Callable[[ConfigDict], bool] = lambda config: True
  # Other sections of the config that the stage reads.
  reads: Callable[[ConfigDict], tuple[str, ...]] = lambda config: ()
  # Batches by the setting that gives their size, with the batch of the update last. The
  # mesh must divide them. None for the one batch of the section: examples, or prompts
  # with their groups of responses.
  batches: Callable[[ConfigDict], dict[str, RowSplit]] | None = None
  # Settings of the section that may name a file, with a description of the file.
  files: Mapping[str, str] = {}
  # Computation on the devices; None for a stage that is not planned.
  workload: Callable[[Run, str], Workload] | None = None
  # Whether the stage trains the SFT policy further. Measurements include its result.
  trains_policy: bool = False
  has_rollouts: bool = False  # Whether the log has samples with scores.
  in_rounds: bool = False  # Whether each round of a recipe runs it, as "dpo_2".
  # Whether the stage measures the policies of the workdir. It runs again when there are
  # more policies.
  is_measurement: bool = False
  # Parts of a measurement of each policy. It runs again when there are more parts.
  parts: Callable[[ConfigDict], tuple[str, ...]] = lambda config: ("",)
  paper: str = ""  # arXiv number of the method's paper, as "2402.03746".

  def make_schedule(self, config: ConfigDict) -> TrainingSchedule:
    """Returns the training schedule that the config gives."""
    section = config[self.section]
    values = {
      name: section[name] for name in TrainingSchedule._fields if name in section
    }
    values["steps"] = section[self.steps]
    if "rollout" in section:
      values["max_staleness"] = section.rollout.max_staleness
    return TrainingSchedule(**values)

  def count_steps(self, run: Run) -> int:
    """Returns the total of the progress line."""
    return self.make_schedule(run.config).steps if self.steps else self.total_steps(run)

  def check_settings(self, config: ConfigDict) -> None:
    """Checks every setting of the section, before the first stage starts.

    Raises:
      UserError: A value is invalid.
    """
    section, minima = config[self.section], MIN_BATCH
    self.check(config)
    if self.steps:
      minima = MIN_TRAINING | {self.steps: 1}
    with user_errors(self.section):
      check_at_least(section, {key: n for key, n in minima.items() if key in section})
      if self.steps:
        alarms.check(section.alarms)
        with subsection("optimizer"):
          updates.check(section.optimizer, self.make_schedule(config).updates)

  def get_row_splits(self, config: ConfigDict) -> dict[str, RowSplit]:
    """Returns the stage's batches by the setting that gives their size."""
    if self.batches:
      return self.batches(config)
    section = config[self.section]
    if "batch" in section:
      return {f"{self.section}.batch": RowSplit(section.batch)}
    parts = section.microbatches * section.get("minibatches", 1)
    return {f"{self.section}.batch_size": RowSplit(section.batch_size, parts)}

  def get_token_lengths(self, config: ConfigDict) -> dict[str, int]:
    """Returns the lengths of logits, which mesh.context must divide, by setting."""
    section = config[self.section]
    if not self.steps or "chunk" not in section:
      return {}
    prompt_len, response_len = get_row_lengths(config, self.section)
    names = " + ".join(get_length_settings(config, self.section))
    return {
      f"{self.section}.chunk": section.chunk,
      f"{self.section}: {names}": prompt_len + response_len,
    }


def get_length_settings(config: ConfigDict, section: str) -> tuple[str, str]:
  """Returns the settings of the prompt length and the response length of a section.

  A section of judges has its own. Others use those of the data.
  """
  if "prompt_len" in config[section]:
    return f"{section}.prompt_len", f"{section}.max_new"
  return "data.prompt_len", "data.response_len"


def get_row_lengths(config: ConfigDict, section: str) -> tuple[int, int]:
  """Returns the maximum tokens of a section's prompts and of its responses."""
  prompt, response = (key.split(".") for key in get_length_settings(config, section))
  return config[prompt[0]][prompt[1]], config[response[0]][response[1]]


def write_facts(
  folder: pathlib.Path,
  title: str,
  *,
  has_rollouts: bool = False,
  is_measurement: bool = False,
) -> None:
  """Writes stage.json, which reports read, unless it exists; for facts, see Stage."""
  path = folder / "stage.json"
  if not path.exists():
    facts = dict(title=title, has_rollouts=has_rollouts, is_measurement=is_measurement)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**facts, "started": time.time()})


def read_start(folder: pathlib.Path) -> float:
  """Returns the Unix time at which a stage started; 0 if stage.json is damaged."""
  try:
    return float(read_json(folder / "stage.json", default={}).get("started", 0.0))
  except (ValueError, AttributeError, TypeError):
    return 0.0


@functools.cache
def load_stages() -> dict[str, Stage]:
  """Imports the modules of the three packages and returns all stages by name."""
  stages: dict[str, Stage] = {}
  for package in PACKAGES:
    parent = importlib.import_module(f"vlmrlaif_jax.stages.{package}")
    for module in pkgutil.iter_modules(parent.__path__, f"{parent.__name__}."):
      declared = vars(importlib.import_module(module.name)).get("STAGES", ())
      stages |= {stage.name: stage for stage in declared}
  return stages


def list_policy_stages(workdir: pathlib.Path) -> list[str]:
  """Returns the stages with a trained policy in a workdir, in the order of their start.

  SFT is not included, because every workdir with a policy has it. Every process calls
  this function, outside of on_process_zero: has_checkpoint is collective.
  """
  started = distributed.on_process_zero(lambda: _find_started_stages(workdir))
  return [name for name in started if has_checkpoint(workdir / name)]


def _find_started_stages(workdir: pathlib.Path) -> list[str]:
  entries = []
  for folder in workdir.iterdir():
    stage = load_stages().get(split_round(folder.name)[0])
    if stage and stage.trains_policy:
      entries.append((read_start(folder), *split_round(folder.name), folder.name))
  return [name for *_, name in sorted(entries)]


def get_stage(name: str) -> Stage:
  """Returns the stage of a name, with or without a round: "dpo_2" gives "dpo"."""
  return load_stages()[split_round(name)[0]]


def load_workdir_policies(run: Run) -> dict[str, Params]:
  """Returns variables of the SFT policy and of all other policies of the workdir."""
  return role_params.load_all_policies(run, list_policy_stages(run.workdir))


def format_title(name: str) -> str:
  """Returns the title of a stage with its round, as "DPO, round 2"."""
  title, (_, number) = get_stage(name).title, split_round(name)
  return f"{title}, round {number}" if number else title
