"""The stages of a recipe as they are planned: each stage's own workload, on shapes."""

from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import PyTree

from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Function, Workload
from vlmrlaif_jax.stages.stage import stage_of


class PlannedStage(NamedTuple):
  """A stage of a recipe by name, and what it runs on the devices."""

  name: str
  workload: Workload


def planned_stages(run: Run, names: list[str]) -> Iterator[PlannedStage]:
  """Yields the stages of these names that run anything on the devices.

  Args:
    run: see abstract_run.make.
    names: names of stages, with their rounds.
  """
  for name in names:
    if (workload := stage_of(name).workload) is not None:
      yield PlannedStage(name, workload(run, name))


def resident(run: Run, stage: PlannedStage, function: Function) -> PyTree:
  """Returns what is on the devices while a function runs, whether it reads it or not.

  These are the models that the run was made with and, once its videos are encoded, the
  weights and states of all functions of the stage.
  """
  loaded = run.base, run.scorer_base
  if function.name == "encode":
    return loaded
  return loaded, [(each.roles, each.state) for each in stage.workload.functions]


def section_of(stage: str) -> str:
  """Returns the section of the config that a stage reads."""
  return stage_of(stage).section
