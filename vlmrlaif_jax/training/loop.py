"""The training loop: data, experience, updates, log, checkpoints. The only one."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmrlaif_jax.core.interrupts import NO_MONITOR, StageMonitor, Stopped
from vlmrlaif_jax.core.prefetch import prefetch
from vlmrlaif_jax.core.profiling import PhaseTimer, format_shares
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Frozen, Params, TrainState
from vlmrlaif_jax.training import alarms, checkpoint
from vlmrlaif_jax.training.job import (
  TrainingJob,
  TrainingSchedule,
  jit_update,
  optimizer_and_init,
)

# What it says holds before a step's first update alone, while the policy is the one
# that sampled.
FIRST_UPDATE_METRICS = "sampler_gap"


def fit_job(
  job: TrainingJob,
  *,
  key: jax.Array,
  place: Callable[[Any], Any],
  log: StageLog,
  watch: StageMonitor = NO_MONITOR,
) -> TrainState:
  """Trains a job from the last checkpoint in the log's folder, or from its start.

  Args:
    place: state -> its shardings.
    The others: see train.
  """
  tx, init = optimizer_and_init(job)
  # Rules also speak of the optimizer's copies of the parameters, by their paths.
  shardings = place(jax.eval_shape(init, job.params))
  state = jax.jit(init, out_shardings=shardings)(job.params)
  state, sampler = restore_training(log, state, job.schedule)
  update = jit_update(job, tx, shardings)
  return run_training(job, update, state, sampler, key=key, log=log, watch=watch)


def run_training(
  job: TrainingJob,
  update: Callable,
  state: TrainState,
  sampler: Params,
  *,
  key: jax.Array,
  log: StageLog,
  watch: StageMonitor = NO_MONITOR,
) -> TrainState:
  """Trains from the step that `state` stands at, and saves its last state.

  Args:
    job: its data are a pure function of the step, so that resuming changes nothing.
    update: jitted; (state, frozen, experience) -> (state, metrics).
    sampler: the params that sample the first rollout.
    key: of all that is random; each step folds in its number.
    log: of the stage; checkpoints go below its folder.
    watch: asked after each step whether to save and end.

  Raises:
    Stopped, Alarmed: it was to end, or an alarm ended it, before its last step.
  """
  plan, frozen = job.schedule, job.frozen
  start = int(state.step) // plan.updates_per_step
  if start < plan.steps:
    log.print_note(f"{log.stage}: compiling at the first step, from step {start}")
  phases = PhaseTimer()
  bells = alarms.AlarmLog(job.alarms, log, last=start)
  rollouts = _Rollouts(job, phases, key, range(start, plan.steps))
  ready = None
  for step in range(start, plan.steps):
    done, begun, made = step + 1, None, []
    with watch.step(step):
      now = ready or rollouts.finish(rollouts.begin(step, sampler, frozen))
      frozen = now.frozen
      if plan.async_rollouts:
        sampler = _copied(state.params)  # The update donates its own.
        if done < plan.steps:
          begun = rollouts.begin(done, sampler, frozen)
      with phases("update"):
        key_of_step = jax.random.fold_in(key, step)
        for part in _minibatches(now.experience, key_of_step, plan):
          state, metrics = update(state, frozen, part)
          made.append(metrics)
      told = rollouts.told(step, now)
      ready = rollouts.finish(begun) if begun else None
      sampler = sampler if plan.async_rollouts else state.params
      if done % plan.log_every == 0 or done == plan.steps:
        _log(log, bells, plan, step, now.info, told, made, phases)
    ending = watch.stop()
    if done % plan.save_every == 0 or done == plan.steps or ending:
      with phases("save"):
        kept = _with_sampler(state, sampler, plan)
        checkpoint.save_checkpoint(
          get_checkpoint_folder(log), kept, done, keep=plan.keep
        )
    if ending and done < plan.steps:
      raise Stopped(f"{log.stage}: step {done} of {plan.steps} is done and saved")
  return state


class _Rollout(NamedTuple):
  """What a step learns from: as the device is at work on it, then whole."""

  batch: Any
  frozen: Params
  params: Params | None  # That sample; None once it is whole, as `sampled`.
  sampled: Any
  experience: Any
  info: dict[str, jax.Array]


class _Rollouts:
  """The experience of each step, made in two parts; see types.Collect."""

  def __init__(
    self, job: TrainingJob, phases: PhaseTimer, key: jax.Array, steps: range
  ):
    self._collect, self._hooks, self._phases = job.method.collect, job.hooks, phases
    self._key, self._batches = key, prefetch(map(job.data, steps))

  def begin(self, step: int, params: Params, frozen: Params) -> _Rollout:
    """Gives the device the sampling of a step, and does not wait for it."""
    with self._phases("data"):
      batch = next(self._batches)
    frozen = Frozen({**frozen, **self._hooks.before(step, params)})
    with self._phases("sample"):
      key = jax.random.fold_in(self._key, step)
      sampled = self._collect.begin(key, params, frozen, batch)
    return _Rollout(batch, frozen, params, sampled, None, {})

  def finish(self, begun: _Rollout) -> _Rollout:
    """Scores and weighs what was sampled."""
    experience, info = self._collect.finish(
      begun.params, begun.frozen, begun.sampled, self._phases
    )
    if experience is not begun.batch:
      # A compiler that is left to choose may give every device all of its rows.
      where = jax.tree.leaves(begun.batch)[0].sharding
      experience = jax.device_put(experience, where)
    return _Rollout(begun.batch, begun.frozen, None, None, experience, info)

  def told(self, step: int, ready: _Rollout) -> dict[str, float]:
    """What the stage makes of a step, while the device is at work on the update."""
    with self._phases("weigh"):  # The device was given it before the update.
      jax.block_until_ready(ready.info)
    with self._phases("tell"):
      return self._hooks.on_step(step, ready.batch, ready.info)


def _log(
  log: StageLog,
  bells: alarms.AlarmLog,
  plan: TrainingSchedule,
  step: int,
  info: dict,
  told: dict[str, float],
  made: Sequence[dict],
  phases: PhaseTimer,
) -> None:
  """Logs the metrics of a step's last update, but what is not finite in any of them.

  Args:
    info: numbers alone are metrics; arrays in it are for hooks.
    told: by hooks.
    made: the metrics of each update of the step.
  """
  with phases("update"):
    made = jax.device_get(made)
  metrics = {**told, **made[-1]}
  for each in made:
    metrics |= {name: x for name, x in each.items() if not np.isfinite(x)}
  gap = metrics.pop(FIRST_UPDATE_METRICS, None)
  if gap is not None and not (plan.async_rollouts and step):
    metrics[FIRST_UPDATE_METRICS] = made[0][FIRST_UPDATE_METRICS]
  if plan.async_rollouts:  # Updates that the policy which sampled is behind.
    metrics["staleness"] = plan.updates_per_step if step else 0
  scalars = {k: v for k, v in info.items() if np.ndim(v) == 0}
  shown = {k: float(v) for k, v in {**scalars, **metrics}.items()}
  seconds = phases.take_seconds()
  log.log_metrics(step + 1, shown, seconds)
  holding = bells.look(step + 1, shown)
  log.log_progress(
    step + 1, shown, note=f"({format_shares(seconds)}) {holding}".rstrip()
  )


def get_checkpoint_folder(log: StageLog) -> str:
  return str(log.folder / "checkpoints")


def _with_sampler(
  state: TrainState, sampler: Params, plan: TrainingSchedule
) -> TrainState:
  """The state as it is saved: one step off, with the params that sample next."""
  if not plan.async_rollouts:
    return state
  return state._replace(opt_state={"optimizer": state.opt_state, "sampler": sampler})


def restore_training(
  log: StageLog, start: TrainState, plan: TrainingSchedule
) -> tuple[TrainState, Params]:
  """(state, the params that sample next) of the last checkpoint, or of the start."""
  at = get_checkpoint_folder(log)
  if checkpoint.get_latest_step(at) is None:
    return start, start.params
  kept = checkpoint.restore_checkpoint(at, _with_sampler(start, start.params, plan))
  if not plan.async_rollouts:
    return kept, kept.params
  state = kept._replace(opt_state=kept.opt_state["optimizer"])
  return state, kept.opt_state["sampler"]


@jax.jit
def _copied(params: Params) -> Params:
  return jax.tree.map(jnp.copy, params)


def _minibatches(
  experience: Any, key: jax.Array, plan: TrainingSchedule
) -> Iterator[Any]:
  """The experience in shuffled parts, epoch by epoch."""
  if plan.epochs == plan.minibatches == 1:
    yield experience
    return
  first = jax.tree.leaves(experience)[0]
  for epoch in range(plan.epochs):
    order = jax.random.permutation(jax.random.fold_in(key, epoch), len(first))
    for part in order.reshape(plan.minibatches, -1):
      yield _take(experience, part, first.sharding)


@functools.partial(jax.jit, static_argnums=2)
def _take(experience: Any, rows: jax.Array, where: jax.sharding.Sharding) -> Any:
  """These rows of the experience, spread over the devices as all of them are."""
  part = jax.tree.map(lambda x: x[rows], experience)
  return jax.lax.with_sharding_constraint(part, where)
