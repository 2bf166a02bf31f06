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
  """The length of training, and the intervals of saving and logging."""

  steps: int  # Batches of data, or rollouts.
  save_every: int  # Steps between two checkpoints.
  log_every: int = 1  # Steps between two lines of metrics.
  keep: int = 1  # Number of checkpoints that stay on disk.
  epochs: int = 1  # Passes over the experience of a step.
  minibatches: int = 1  # Updates per pass.
  # Maximum number of steps that a rollout is sampled ahead. With N, the rollout of step
  # t + N begins before the update of step t, so that sampling and scoring overlap
  # updates. The loss corrects with importance ratios. It requires N more copies of the
  # trained parameters.
  max_staleness: int = 0

  @property
  def updates_per_step(self) -> int:
    """Optimizer updates per step."""
    return self.epochs * self.minibatches

  @property
  def updates(self) -> int:
    """Optimizer updates of the whole stage."""
    return self.steps * self.updates_per_step


class Hooks(NamedTuple):
  """Functions that the loop calls around each step."""

  # Called before each rollout: (step, params) -> entries for `frozen`.
  before_step: Callable[[int, Params], Params] = lambda step, params: {}
  # Called after each rollout: (step, data, info of `collect`) -> values to log.
  after_step: Callable[[int, Any, dict], dict[str, float]] = lambda step, data, info: {}


NO_HOOKS = Hooks()


def _raise_no_data(step: int) -> Any:
  raise ValueError("a job of shapes has no data: set TrainingJob.data to train it")


class TrainingJob(NamedTuple):
  """The arrays, functions and settings of a training stage.

  A stage creates one job for two uses. The loop trains it on arrays. The planner
  compiles the same functions for a job whose parameters are `jax.ShapeDtypeStruct`s.
  """

  method: Method
  params: Params  # Initial trained parameters by role.
  frozen: Params  # Other arrays that the method reads, by role.
  batch_spec: Any  # Shapes, dtypes and shardings of a batch of `data`.
  schedule: TrainingSchedule
  optimizer: ConfigDict  # See update.default_config.
  # Model passes by the name of their jitted function: a phase of `collect`, or
  # "update".
  passes: dict[str, list[ModelPass]]
  alarms: ConfigDict  # See alarms.default_config.
  microbatches: int = 1  # Parts of a batch whose gradients are summed in turn.
  dropout_key: jax.Array | None = None  # Random key of dropout; None disables it.
  hooks: Hooks = NO_HOOKS
  # Returns the batch of a step, on the devices.
  data: Callable[[int], Any] = _raise_no_data


def make_optimizer_and_init(
  job: TrainingJob,
) -> tuple[optax.GradientTransformation, Callable[[Params], TrainState]]:
  """Returns the optimizer, and the function from parameters to the initial state."""
  tx = updates.make_optimizer(job.optimizer, job.schedule.updates)
  # Updates donate the state, but the parameters may stay in use: copy them.
  return tx, lambda params: updates.init_state(jax.tree.map(jnp.copy, params), tx)


def jit_update(
  job: TrainingJob, tx: optax.GradientTransformation, state_shardings: Any
) -> Callable:
  """Returns the jitted update; see update.make_update."""
  return jax.jit(
    updates.make_update(
      job.method.loss,
      tx,
      microbatches=job.microbatches,
      dropout_key=job.dropout_key,
    ),
    donate_argnums=0,
    in_shardings=(state_shardings, None, None),  # None: the sharding of the argument.
    out_shardings=(state_shardings, None),
  )
