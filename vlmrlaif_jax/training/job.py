"""The description of a training stage that the loop runs and the planner compiles."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vlmrlaif_jax.core.types import Method, ModelPass, Params, TrainState
from vlmrlaif_jax.training import update as updates


class TrainingSchedule(NamedTuple):
  """How long to train, and how often to save and to log."""

  steps: int  # Batches of data, or rollouts.
  save_every: int  # Steps between two checkpoints.
  log_every: int = 1  # Steps between two lines of metrics.
  keep: int = 1  # Checkpoints that stay on disk.
  epochs: int = 1  # Passes over the experience of a step.
  minibatches: int = 1  # Updates in each pass.
  # If True, rollout t + 1 is sampled with the parameters from before update t, so that
  # scoring on the host overlaps the update. The loss corrects with importance ratios.
  # Doubles the memory of the trained parameters.
  async_rollouts: bool = False

  @property
  def updates_per_step(self) -> int:
    return self.epochs * self.minibatches

  @property
  def updates(self) -> int:
    """Optimizer updates of the whole stage."""
    return self.steps * self.updates_per_step


class Hooks(NamedTuple):
  """Functions that the loop calls around each step."""

  # Before each rollout: from the step and the parameters to entries for `frozen`.
  before: Callable[[int, Params], Params] = lambda step, params: {}
  # From a step, its data and the info of `collect` to values to log.
  on_step: Callable[[int, Any, dict], dict[str, float]] = lambda step, data, info: {}


NO_HOOKS = Hooks()


def _no_data(step: int) -> Any:
  raise ValueError("this job has no data: it describes shapes alone")


class TrainingJob(NamedTuple):
  """All that a stage trains.

  A stage makes one job for both uses. The loop runs it on arrays. The planner makes it
  with `jax.ShapeDtypeStruct`s as parameters and compiles the same functions.
  """

  method: Method
  params: Params  # Trained parameters by role, as they start.
  frozen: Params  # All other arrays that the method reads, by role.
  batch_spec: Any  # Shapes, dtypes and shardings of what `data` returns.
  schedule: TrainingSchedule
  optimizer: ConfigDict  # See update.default_config.
  # The model passes of each jitted function: those of `collect` by their names, those
  # of the update under "update".
  passes: dict[str, list[ModelPass]]
  alarms: ConfigDict  # See alarms.default_config.
  microbatches: int = 1  # Parts of a batch whose gradients are summed one by one.
  hooks: Hooks = NO_HOOKS
  data: Callable[[int], Any] = _no_data  # From a step to its batch on the devices.


def optimizer_and_init(
  job: TrainingJob,
) -> tuple[optax.GradientTransformation, Callable[[Params], TrainState]]:
  """Returns the optimizer, and the function from parameters to the first state."""
  tx = updates.make_optimizer(job.optimizer, job.schedule.updates)
  # A copy, because updates donate the state and the parameters may stay in use.
  return tx, lambda params: updates.init_state(jax.tree.map(jnp.copy, params), tx)


def jit_update(
  job: TrainingJob, tx: optax.GradientTransformation, state_shardings: Any
) -> Callable:
  """Returns the update step, compiled at its first call."""
  return jax.jit(
    updates.make_update(job.method.loss, tx, microbatches=job.microbatches),
    donate_argnums=0,
    in_shardings=(state_shardings, None, None),  # The others carry their own.
    out_shardings=(state_shardings, None),
  )
