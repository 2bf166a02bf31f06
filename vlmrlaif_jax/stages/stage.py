"""The declaration of a stage, and the table of all stages.

A module of stages/training, stages/labeling or stages/evaluation that has a tuple
`STAGES` declares stages; nothing else has to know of it. The runner, the validation,
the planner, the report, the model card and the documentation read the table.
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
# The smallest values of settings that mean the same in every section that has them, and
# of those of stages that train.
MIN_BATCH = dict(batch=1, block=1)
MIN_TRAINING = dict(
  **dict(batch_size=1, microbatches=1, minibatches=1, epochs=1, samples=1, slots=0),
  **dict(save_every=1, log_every=1, samples_every=1, keep=1),
  **dict(prompt_len=1, max_new=1, chunk=1, pack_len=0),
)
PREFERENCES = "a file of preferences, see docs/data.md"  # For `files`.


class RowSplit(NamedTuple):
  """How the rows of a batch are divided."""

  rows: int
  parts: int = 1  # Microbatches times minibatches.

  def divides(self, shards: int) -> bool:
    """Returns whether each part divides by so many shards of rows."""
    return self.rows % (self.parts * shards) == 0


class Stage(NamedTuple):
  """A stage of a recipe."""

  name: str  # In a recipe's `stages`; also its folder in the workdir.
  title: str  # For reports and model cards.
  section: str  # Of the config.
  # From the run, the stage's name (with its round, as "dpo_2"), its folder and its log
  # to the summary that done.json holds.
  run: Callable[[Run, str, pathlib.Path, StageLog], dict[str, Any]]
  # Raises UserError if a setting of its own has a wrong value; see check_settings.
  check: Callable[[ConfigDict], None] = lambda config: None
  # The setting of its section with the number of its steps; "" if it does not train.
  steps: str = ""
  # Steps of the progress line of a stage that does not train.
  total_steps: Callable[[Run], int] = lambda run: 0
  # Other sections of the config that it reads; its own section may decide that.
  reads: Callable[[ConfigDict], tuple[str, ...]] = lambda config: ()
  # Batches by the setting that gives their size, for the mesh to divide. None for the
  # one of its section: examples, or prompts with their groups of responses. That of an
  # update comes last.
  batches: Callable[[ConfigDict], dict[str, RowSplit]] | None = None
  # Settings of its section that may name a file, with what the file holds.
  files: Mapping[str, str] = {}
  # What it runs on the devices; None for a stage that is not planned.
  workload: Callable[[Run, str], Workload] | None = None
  # Whether it trains SFT's policy further; measurements include what it leaves.
  trains_policy: bool = False
  has_rollouts: bool = False  # Whether its log has samples with scores.
  in_rounds: bool = False  # Whether each round of a recipe runs it, as "dpo_2".
  # Whether it measures the policies of the workdir. It runs again when there are more.
  is_measurement: bool = False
  # What a measurement measures of each policy. It runs again when there is more.
  parts: Callable[[ConfigDict], tuple[str, ...]] = lambda config: ("",)
  paper: str = ""  # The method's paper, as "2402.03746".

  def schedule(self, config: ConfigDict) -> TrainingSchedule:
    """Returns how long the stage trains, and how often it saves and logs."""
    given = config[self.section]
    known = {name: given[name] for name in TrainingSchedule._fields if name in given}
    return TrainingSchedule(**{**known, "steps": given[self.steps]})

  def count_steps(self, run: Run) -> int:
    """Returns the steps of the progress line."""
    return self.schedule(run.config).steps if self.steps else self.total_steps(run)

  def check_settings(self, config: ConfigDict) -> None:
    """Checks every setting of the section, before the first stage starts.

    Raises:
      UserError: a value is wrong.
    """
    given, least = config[self.section], MIN_BATCH
    self.check(config)
    if self.steps:
      least = MIN_TRAINING | {self.steps: 1}
    with user_errors(self.section):
      check_at_least(given, {key: n for key, n in least.items() if key in given})
      if self.steps:
        alarms.check(given.alarms)
        with subsection("optimizer"):
          updates.check(given.optimizer, self.schedule(config).updates)

  def rows(self, config: ConfigDict) -> dict[str, RowSplit]:
    """Returns its batches by the setting that gives their size."""
    if self.batches:
      return self.batches(config)
    given = config[self.section]
    if "batch" in given:
      return {f"{self.section}.batch": RowSplit(given.batch)}
    parts = given.microbatches * given.get("minibatches", 1)
    return {f"{self.section}.batch_size": RowSplit(given.batch_size, parts)}

  def lengths(self, config: ConfigDict) -> dict[str, int]:
    """Returns the tokens that it computes logits of, which mesh.context must divide."""
    given = config[self.section]
    if not self.steps or "chunk" not in given:
      return {}
    prompt_len, response_len = get_row_lengths(config, self.section)
    names = " + ".join(get_length_settings(config, self.section))
    return {
      f"{self.section}.chunk": given.chunk,
      f"{self.section}: {names}": prompt_len + response_len,
    }


def get_length_settings(config: ConfigDict, section: str) -> tuple[str, str]:
  """Returns the settings with the tokens of a section's prompts and responses.

  They are the section's own (a judge's) or those of the data.
  """
  if "prompt_len" in config[section]:
    return f"{section}.prompt_len", f"{section}.max_new"
  return "data.prompt_len", "data.response_len"


def get_row_lengths(config: ConfigDict, section: str) -> tuple[int, int]:
  """Returns the tokens of a section's prompts, and the most of a response."""
  prompt, response = (key.split(".") for key in get_length_settings(config, section))
  return config[prompt[0]][prompt[1]], config[response[0]][response[1]]


def write_facts(
  folder: pathlib.Path,
  title: str,
  *,
  has_rollouts: bool = False,
  is_measurement: bool = False,
) -> None:
  """Writes stage.json, which reports read, unless it exists. For facts, see Stage."""
  path = folder / "stage.json"
  if not path.exists():
    facts = dict(title=title, has_rollouts=has_rollouts, is_measurement=is_measurement)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**facts, "started": time.time()})


@functools.cache
def load_stages() -> dict[str, Stage]:
  """Imports the modules of the three packages and returns every stage by its name."""
  stages: dict[str, Stage] = {}
  for package in PACKAGES:
    parent = importlib.import_module(f"vlmrlaif_jax.stages.{package}")
    for found in pkgutil.iter_modules(parent.__path__, f"{parent.__name__}."):
      declared = vars(importlib.import_module(found.name)).get("STAGES", ())
      stages |= {stage.name: stage for stage in declared}
  return stages


def list_policy_stages(workdir: pathlib.Path) -> list[str]:
  """Returns the stages that have left a policy in a workdir, in the order they began.

  SFT is not among them: every workdir with a policy has it. Every process calls this,
  outside of what one process makes for all: to look for checkpoints is done together.
  """
  begun = distributed.on_process_zero(lambda: _begun_policy_stages(workdir))
  return [name for name in begun if has_checkpoint(workdir / name)]


def _begun_policy_stages(workdir: pathlib.Path) -> list[str]:
  found = []
  for folder in workdir.iterdir():
    stage = load_stages().get(split_round(folder.name)[0])
    if stage and stage.trains_policy:
      facts = read_json(folder / "stage.json", default={})
      found.append((facts.get("started", 0.0), *split_round(folder.name), folder.name))
  return [name for *_, name in sorted(found)]


def get_stage(name: str) -> Stage:
  """Returns the stage of a name, which may have a round: "dpo_2" is a "dpo"."""
  return load_stages()[split_round(name)[0]]


def load_workdir_policies(run: Run) -> dict[str, Params]:
  """Returns variables of the SFT policy and of all policies that the workdir holds."""
  return role_params.load_all_policies(run, list_policy_stages(run.workdir))


def format_title(name: str) -> str:
  """Returns the title of a stage with its round, as "DPO, round 2"."""
  title, (_, number) = get_stage(name).title, split_round(name)
  return f"{title}, round {number}" if number else title
