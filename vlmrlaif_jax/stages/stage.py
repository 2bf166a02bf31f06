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
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.files import read_json, write_json
from vlmrlaif_jax.core.stage_log import Log, split_round
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.runtime.arrays import has_checkpoint
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.training.job import TrainingSchedule

PACKAGES = ("training", "labeling", "evaluation")


class Rows(NamedTuple):
  """How the rows of a batch are divided."""

  rows: int
  parts: int = 1  # Microbatches times minibatches.


class Stage(NamedTuple):
  """A stage of a recipe."""

  name: str  # In a recipe's `stages`; also its folder in the workdir.
  title: str  # For reports and model cards.
  section: str  # Of the config.
  # From the run, the stage's name (with its round, as "dpo_2"), its folder and its log
  # to the summary that done.json holds.
  run: Callable[[Run, str, pathlib.Path, Log], dict[str, Any]]
  total_steps: Callable[[Run], int]  # For the progress line.
  # Raises UserError if a setting that the stage reads has a wrong value.
  check: Callable[[ConfigDict], None]
  # Batches by the setting that gives their size, for the mesh to divide.
  batches: Callable[[ConfigDict], dict[str, Rows]]
  # Other sections of the config that it reads; its own section may decide that.
  reads: Callable[[ConfigDict], tuple[str, ...]] = lambda config: ()
  # Numbers of tokens by what gives them, which mesh.context has to divide.
  lengths: Callable[[ConfigDict], dict[str, int]] = lambda config: {}
  # How long it trains; None for a stage that does not train.
  schedule: Callable[[ConfigDict], TrainingSchedule] | None = None
  # What it runs on the devices; None for a stage that is not planned.
  workload: Callable[[Run, str], Workload] | None = None
  # Whether it trains SFT's policy further; measurements include what it leaves.
  trains_policy: bool = False
  has_rollouts: bool = False  # Whether its log has samples with scores.
  # Whether it measures the policies of the workdir. It runs again when there are more.
  is_measurement: bool = False
  # What a measurement measures of each policy. It runs again when there is more.
  parts: Callable[[ConfigDict], tuple[str, ...]] = lambda config: ("",)
  paper: str = ""  # The method's paper, as "2402.03746".


def modules() -> Iterator[ModuleType]:
  """Imports the modules of the three packages."""
  for package in PACKAGES:
    parent = importlib.import_module(f"vlmrlaif_jax.stages.{package}")
    for found in pkgutil.iter_modules(parent.__path__, f"{parent.__name__}."):
      yield importlib.import_module(found.name)


def write_facts(
  folder: pathlib.Path,
  title: str,
  *,
  has_rollouts: bool = False,
  is_measurement: bool = False,
) -> None:
  """Writes stage.json, which reports read, unless it exists.

  Args:
    folder: Folder of the stage.
    title: Title with the round.
    has_rollouts: See Stage.
    is_measurement: See Stage.
  """
  path = folder / "stage.json"
  if path.exists():
    return
  facts = {
    "title": title,
    "has_rollouts": has_rollouts,
    "is_measurement": is_measurement,
    "started": time.time(),
  }
  folder.mkdir(parents=True, exist_ok=True)
  write_json(path, facts)


@functools.cache
def all_stages() -> dict[str, Stage]:
  """Returns every stage by its name."""
  declared = [vars(module).get("STAGES", ()) for module in modules()]
  return {stage.name: stage for each in declared for stage in each}


def policy_stages(workdir: pathlib.Path) -> list[str]:
  """Returns the stages that have left a policy in a workdir, in the order they began.

  SFT is not among them: every workdir with a policy has it. Every process calls this,
  outside of what one process makes for all: to look for checkpoints is done together.
  """
  begun = distributed.once(lambda: _begun_policy_stages(workdir))
  return [name for name in begun if has_checkpoint(workdir / name)]


def _begun_policy_stages(workdir: pathlib.Path) -> list[str]:
  found = []
  for folder in workdir.iterdir():
    stage = all_stages().get(split_round(folder.name)[0])
    if stage and stage.trains_policy:
      facts = read_json(folder / "stage.json", default={})
      found.append((facts.get("started", 0.0), *split_round(folder.name), folder.name))
  return [name for *_, name in sorted(found)]


def stage_of(name: str) -> Stage:
  """Returns the stage of a name, which may have a round: "dpo_2" is a "dpo"."""
  return all_stages()[split_round(name)[0]]


def policies_of(run: Run) -> dict[str, Params]:
  """Returns variables of the SFT policy and of all policies that the workdir holds."""
  return role_params.policies(run, policy_stages(run.workdir))


def title_of(name: str) -> str:
  """Returns the title of a stage with its round, as "DPO, round 2"."""
  title, (_, number) = stage_of(name).title, split_round(name)
  return f"{title}, round {number}" if number else title
