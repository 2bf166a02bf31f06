"""The training loop: data, rollouts, updates, logs, checkpoints."""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmrlaif_jax.core.errors import note_place
from vlmrlaif_jax.core.interrupts import NO_MONITOR, StageMonitor, Stopped
from vlmrlaif_jax.core.prefetch import prefetch
from vlmrlaif_jax.core.profiling import PhaseTimer, format_shares
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Frozen, Metrics, Params, TrainState
from vlmrlaif_jax.training import alarms, checkpoint
from vlmrlaif_jax.training.job import (
  TrainingJob,
  TrainingSchedule,
  jit_update,
  make_optimizer_and_init,
)

# A metric of the first update of a step. Only then is the policy the one that sampled.
FIRST_UPDATE_METRIC = "sampler_gap"


def fit_job(
  job: TrainingJob,
  *,
  key: jax.Array,
  place: Callable[[Any], Any],
  log: StageLog,
  watch: StageMonitor = NO_MONITOR,
) -> TrainState:
  """Trains a job, resuming from the last checkpoint in the log's folder.

  Args:
    job: Job to train.
    key: Random key of the stage; each step folds in its number.
    place: Function from shapes of the state to shardings.
    log: Log of the stage; checkpoints are saved in its folder.
    watch: Monitor of stop signals and traces.

  Returns:
    The state after the last step.

  Raises:
    Stopped: A stop signal arrived; the last complete step is saved.
    AlarmError: An alarm of `alarms.stop` started.
  """
  tx, init = make_optimizer_and_init(job)
  # Sharding rules also match the optimizer's copies of the parameters by path.
  shardings = place(jax.eval_shape(init, job.params))
  state = jax.jit(init, out_shardings=shardings)(job.params)
  state, samplers = restore_training(log, state, job.schedule)
  update = jit_update(job, tx, shardings)
  return run_training(job, update, state, samplers, key=key, log=log, watch=watch)


def run_training(
  job: TrainingJob,
  update: Callable,
  state: TrainState,
  samplers: Sequence[Params],
  *,
  key: jax.Array,
  log: StageLog,
  watch: StageMonitor = NO_MONITOR,
) -> TrainState:
  """Trains a job from the step of `state`, and saves the last state.

  Args:
    job: Job to train; its batches depend on the step alone, also after a resume.
    update: Jitted function (state, frozen, experience) -> (state, metrics).
    state: State to start from.
    samplers: Parameters that sample the first `max_staleness` rollouts.
    key: Random key of the stage; each step folds in its number.
    log: Log of the stage; checkpoints are saved in its folder.
    watch: Monitor of stop signals and traces.

  Returns and raises as `fit_job`.
  """
  plan = job.schedule
  start = int(state.step) // plan.updates_per_step
  if start < plan.steps:
    log.print_note(f"{log.stage}: compiling at the first step, from step {start}")
  phases = PhaseTimer()
  alarm_log = alarms.AlarmLog(job.alarms, log, last=start)
  sample_key, order_key = jax.random.split(key)
  rollouts = _Rollouts(job, phases, sample_key, range(start, plan.steps), samplers)
  for step in range(start, plan.steps):
    done = step + 1
    with watch.step(step), note_place(f"step {done} of {plan.steps}"):
      current = rollouts.take(step, state.params)
      with phases("update"):
        key_of_step = jax.random.fold_in(order_key, step)
        state, update_metrics = _run_updates(update, state, current, key_of_step, plan)
      hook_metrics = rollouts.run_hook(step, current)
      rollouts.finish_next()
      if done % plan.log_every == 0 or done == plan.steps:
        _log_step(
          log, alarm_log, plan, step, current.info, hook_metrics, update_metrics, phases
        )
    is_stopping = watch.stop()
    if done % plan.save_every == 0 or done == plan.steps or is_stopping:
      with phases("save"):
        saved = _add_samplers(state, rollouts.samplers)
        path = get_checkpoint_folder(log)
        checkpoint.save_train_state(path, saved, done, keep=plan.keep)
    if is_stopping and done < plan.steps:
      raise Stopped(f"{log.stage}: step {done} of {plan.steps} is done and saved")
  return state


def _run_updates(
  update: Callable,
  state: TrainState,
  rollout: "_Rollout",
  key: jax.Array,
  plan: TrainingSchedule,
) -> tuple[TrainState, list[Metrics]]:
  """Updates the state on each minibatch of a rollout; returns it with all metrics."""
  update_metrics = []
  for part in _iterate_minibatches(rollout.experience, key, plan):
    state, metrics = update(state, rollout.frozen, part)
    update_metrics.append(metrics)
  return state, update_metrics


class _Rollout(NamedTuple):
  """A rollout: pending while the device samples, complete after `finish`."""

  batch: Any
  frozen: Params
  params: Params | None  # Parameters that sample; None when complete, like `sampled`.
  sampled: Any
  experience: Any
  info: dict[str, jax.Array]


class _Rollouts:
  """The rollouts of all steps, of which `max_staleness` are begun ahead.

  They are begun, finished and scored in the order of their steps, so that all processes
  run the same programs in the same order.

  Attributes:
    samplers: Parameters that sample the next `max_staleness` rollouts, which a
      checkpoint contains.
  """

  def __init__(
    self,
    job: TrainingJob,
    phases: PhaseTimer,
    key: jax.Array,
    steps: range,
    samplers: Sequence[Params],
  ):
    self._collect, self._hooks, self._phases = job.method.collect, job.hooks, phases
    self._key, self._batches, self._steps = key, prefetch(map(job.data, steps)), steps
    self._frozen, self._next = job.frozen, steps.start
    self._begun: deque[_Rollout] = deque()
    self._finished: deque[_Rollout] = deque()
    self.samplers = deque(samplers)

  def take(self, step: int, params: Params) -> _Rollout:
    """Returns the rollout of a step, and begins the one `max_staleness` steps later.

    Args:
      step: The step; steps are taken in order.
      params: Parameters before the update of the step, which donates them.
    """
    if self.samplers:
      if step == self._steps.start:
        for each in self.samplers:
          self._begin(each)
        self.finish_next()
      self.samplers.popleft()  # Before the copy, so that one less is in memory.
      self.samplers.append(_copy_params(params))
      self._begin(self.samplers[-1])
    else:
      self._begin(params)
      self.finish_next()
    return self._finished.popleft()

  def finish_next(self) -> None:
    """Finishes the rollout of the next step if it is begun."""
    if self._begun:
      self._finished.append(self._finish(self._begun.popleft()))

  def _begin(self, params: Params) -> None:
    """Starts sampling for the next step, if there is one, and does not wait for it."""
    step = self._next
    if step == self._steps.stop:
      return
    self._next += 1
    with self._phases("data"):
      batch = next(self._batches)
    entries = self._hooks.before_step(step, params)
    self._frozen = Frozen({**self._frozen, **entries})
    with self._phases("sample"):
      key = jax.random.fold_in(self._key, step)
      sampled = self._collect.begin(key, params, self._frozen, batch)
    self._begun.append(_Rollout(batch, self._frozen, params, sampled, None, {}))

  def _finish(self, pending: _Rollout) -> _Rollout:
    """Waits for the sampled responses, scores them and builds the experience."""
    experience, info = self._collect.finish(
      pending.params, pending.frozen, pending.sampled, self._phases
    )
    if experience is not pending.batch:
      # Without this, the compiler may replicate all rows on every device.
      rows_sharding = jax.tree.leaves(pending.batch)[0].sharding
      experience = jax.device_put(experience, rows_sharding)
    return _Rollout(pending.batch, pending.frozen, None, None, experience, info)

  def run_hook(self, step: int, rollout: _Rollout) -> dict[str, float]:
    """Runs the hook of a step while the device computes the update."""
    with self._phases("prepare"):  # The device started it before the update.
      jax.block_until_ready(rollout.info)
    with self._phases("log"):
      return self._hooks.after_step(step, rollout.batch, rollout.info)


def _log_step(
  log: StageLog,
  alarm_log: alarms.AlarmLog,
  plan: TrainingSchedule,
  step: int,
  info: dict,
  hook_metrics: dict[str, float],
  update_metrics: Sequence[dict],
  phases: PhaseTimer,
) -> None:
  """Logs the metrics of a step's last update, and non-finite values of any update.

  Arrays in `info` are for hooks. Numbers are metrics.
  """
  with phases("update"):
    update_metrics = jax.device_get(update_metrics)
  metrics = {**hook_metrics, **update_metrics[-1]}
  for update in update_metrics:
    metrics |= {name: x for name, x in update.items() if not np.isfinite(x)}
  gap = metrics.pop(FIRST_UPDATE_METRIC, None)
  steps_ahead = min(step, plan.max_staleness)  # Step 0 has no older parameters.
  if gap is not None and not steps_ahead:
    metrics[FIRST_UPDATE_METRIC] = update_metrics[0][FIRST_UPDATE_METRIC]
  if plan.max_staleness:  # Updates since the policy sampled.
    metrics["staleness"] = steps_ahead * plan.updates_per_step
  scalars = {k: v for k, v in info.items() if np.ndim(v) == 0}
  values = {k: float(v) for k, v in {**scalars, **metrics}.items()}
  seconds = phases.take_seconds()
  log.log_metrics(step + 1, values, seconds)
  active = alarm_log.update(step + 1, values)
  log.log_progress(
    step + 1, values, note=f"({format_shares(seconds)}) {active}".rstrip()
  )


def get_checkpoint_folder(log: StageLog) -> str:
  """Returns the folder of a stage's checkpoints."""
  return str(log.folder / "checkpoints")


def _add_samplers(state: TrainState, samplers: Sequence[Params]) -> TrainState:
  """Adds the parameters of the rollouts that are sampled ahead to a checkpoint."""
  if not samplers:
    return state
  saved = {"optimizer": state.opt_state, "samplers": list(samplers)}
  return state._replace(opt_state=saved)


def restore_training(
  log: StageLog, start: TrainState, plan: TrainingSchedule
) -> tuple[TrainState, list[Params]]:
  """Returns the last saved state, or `start`, and what samples the next rollouts.

  The latter are parameters for each of the next `max_staleness` rollouts. Sampled with
  them again, these rollouts equal those that an uninterrupted run has begun.
  """
  folder = get_checkpoint_folder(log)
  samplers = make_first_samplers(start.params, plan)
  if checkpoint.get_latest_step(folder) is None:
    return start, samplers
  saved = checkpoint.restore_checkpoint(folder, _add_samplers(start, samplers))
  if not samplers:
    return saved, []
  state = saved._replace(opt_state=saved.opt_state["optimizer"])
  return state, saved.opt_state["samplers"]


def make_first_samplers(params: Params, plan: TrainingSchedule) -> list[Params]:
  """Returns the initial parameters for each rollout before the first update.

  They are one copy, because an update donates the parameters.
  """
  if not plan.max_staleness:
    return []
  return [_copy_params(params)] * plan.max_staleness


@jax.jit
def _copy_params(params: Params) -> Params:
  return jax.tree.map(jnp.copy, params)


def _iterate_minibatches(
  experience: Any, key: jax.Array, plan: TrainingSchedule
) -> Iterator[Any]:
  """Yields the experience in shuffled parts, epoch by epoch."""
  if plan.epochs == plan.minibatches == 1:
    yield experience
    return
  first = jax.tree.leaves(experience)[0]
  for epoch in range(plan.epochs):
    order = jax.random.permutation(jax.random.fold_in(key, epoch), len(first))
    for part in order.reshape(plan.minibatches, -1):
      yield _select_rows(experience, part, first.sharding)


@functools.partial(jax.jit, static_argnums=2)
def _select_rows(
  experience: Any, rows: jax.Array, rows_sharding: jax.sharding.Sharding
) -> Any:
  """Selects rows of the experience and keeps their sharding."""
  part = jax.tree.map(lambda x: x[rows], experience)
  return jax.lax.with_sharding_constraint(part, rows_sharding)
