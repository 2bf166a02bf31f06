"""The training loop: data, experience, updates, log, checkpoints. The only one."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmrlaif_jax.core.interrupts import NO_WATCH, Stopped, Watch
from vlmrlaif_jax.core.prefetch import ahead
from vlmrlaif_jax.core.profiling import Phases, shares
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Frozen, Params, TrainState
from vlmrlaif_jax.training import checkpoint
from vlmrlaif_jax.training.job import (
  TrainingJob,
  TrainingSchedule,
  jit_update,
  optimizer_and_init,
)
from vlmrlaif_jax.training.raised import Alarms

# What it says holds before a step's first update alone, while the policy is the one
# that sampled.
AT_FIRST = "sampler_gap"


def fit(
  job: TrainingJob,
  *,
  key: jax.Array,
  place: Callable[[Any], Any],
  folder: str,
  log: Log,
  watch: Watch = NO_WATCH,
) -> TrainState:
  """Trains a job from the last checkpoint in the folder, or from its start.

  Args:
    place: state -> its shardings.
    The others: see train.
  """
  tx, init = optimizer_and_init(job)
  # Rules also speak of the optimizer's copies of the parameters, by their paths.
  shardings = place(jax.eval_shape(init, job.params))
  state = jax.jit(init, out_shardings=shardings)(job.params)
  sampler = state.params
  if checkpoint.latest_step(f"{folder}/checkpoints") is not None:
    state, sampler = restored(folder, state, job.schedule)
  return train(
    job,
    jit_update(job, tx, shardings),
    state,
    key=key,
    folder=folder,
    log=log,
    watch=watch,
    sampler=sampler,
  )


def train(
  job: TrainingJob,
  update: Callable,
  state: TrainState,
  *,
  key: jax.Array,
  folder: str,
  log: Log,
  watch: Watch = NO_WATCH,
  sampler: Params | None = None,
) -> TrainState:
  """Trains from the step that `state` stands at, and saves its last state.

  Args:
    job: its data are a pure function of the step, so that resuming changes nothing.
    update: jitted; (state, frozen, experience) -> (state, metrics).
    key: of all that is random; each step folds in its number.
    folder: of the stage; checkpoints go below it.
    watch: asked after each step whether to save and end.
    sampler: the params that sample the first rollout, if not those of the state.

  Raises:
    Stopped, Alarmed: it was to end, or an alarm ended it, before its last step.
  """
  plan, frozen = job.schedule, job.frozen
  start = int(state.step) // plan.updates_per_step
  if start < plan.steps:
    log.note(f"{log.stage}: compiling at the first step, from step {start}")
  phases = Phases()
  bells = Alarms(job.alarms, folder, log, last=start)
  rollouts = _Rollouts(job, phases, key, range(start, plan.steps))
  sampler, ready = state.params if sampler is None else sampler, None
  for step in range(start, plan.steps):
    done, begun = step + 1, None
    with watch.step(step):
      now = ready or rollouts.finish(rollouts.begin(step, sampler, frozen))
      frozen = now.frozen
      if plan.one_step_off:
        sampler = _copied(state.params)  # The update donates its own.
        if done < plan.steps:
          begun = rollouts.begin(done, sampler, frozen)
      with phases("update"):
        parts = _minibatches(now.experience, jax.random.fold_in(key, step), plan)
        state, made = _updated(update, state, frozen, parts)
      metrics = rollouts.told(step, now)
      ready = rollouts.finish(begun) if begun else None
      sampler = sampler if plan.one_step_off else state.params
      if done % plan.log_every == 0 or done == plan.steps:
        _log(log, bells, plan, step, now.info, metrics, made, phases)
    ending = watch.stop()
    if done % plan.save_every == 0 or done == plan.steps or ending:
      _save(folder, plan, done, state, sampler, phases)
    if ending and done < plan.steps:
      raise Stopped(f"{log.stage}: step {done} of {plan.steps} is done and saved")
  return state


class _Begun(NamedTuple):
  """A rollout that the device is at work on."""

  batch: Any
  params: Params  # That sample.
  frozen: Params
  sampled: Any


class _Ready(NamedTuple):
  """What a step learns from."""

  batch: Any
  frozen: Params
  experience: Any
  info: dict[str, jax.Array]


class _Rollouts:
  """The experience of each step, made in two parts; see types.Collect."""

  def __init__(self, job: TrainingJob, phases: Phases, key: jax.Array, steps: range):
    self._collect, self._hooks, self._phases = job.method.collect, job.hooks, phases
    self._key, self._batches = key, ahead(map(job.data, steps))

  def begin(self, step: int, params: Params, frozen: Params) -> _Begun:
    """Gives the device the sampling of a step, and does not wait for it."""
    with self._phases("data"):
      batch = next(self._batches)
    frozen = Frozen({**frozen, **self._hooks.before(step, params)})
    with self._phases("sample"):
      key = jax.random.fold_in(self._key, step)
      sampled = self._collect.begin(key, params, frozen, batch)
    return _Begun(batch, params, frozen, sampled)

  def finish(self, begun: _Begun) -> _Ready:
    """Scores and weighs what was sampled."""
    experience, info = self._collect.finish(
      begun.params, begun.frozen, begun.sampled, self._phases
    )
    if experience is not begun.batch:
      # A compiler that is left to choose may give every device all of its rows.
      where = jax.tree.leaves(begun.batch)[0].sharding
      experience = jax.device_put(experience, where)
    return _Ready(begun.batch, begun.frozen, experience, info)

  def told(self, step: int, ready: _Ready) -> dict[str, float]:
    """What the stage makes of a step, while the device is at work on the update."""
    with self._phases("weigh"):  # The device was given it before the update.
      jax.block_until_ready(ready.info)
    with self._phases("tell"):
      return self._hooks.on_step(step, ready.batch, ready.info)


def _staleness(plan: TrainingSchedule, step: int) -> dict[str, int]:
  """How many updates older than the policy that learns the one was that sampled."""
  if not plan.one_step_off:
    return {}
  return {"staleness": plan.updates_per_step if step else 0}


def _updated(
  update: Callable, state: TrainState, frozen: Params, parts: Iterator
) -> tuple[TrainState, list[dict]]:
  """(the state after an update from each part, the metrics of each)."""
  made = []
  for part in parts:
    state, metrics = update(state, frozen, part)
    made.append(metrics)
  return state, made


def _joined(made: Sequence[dict], *, stale: bool) -> dict:
  """The metrics of a step's last update, but what is not finite in any of them."""
  metrics = dict(made[-1])
  for each in made:
    metrics |= {name: x for name, x in each.items() if not np.isfinite(x)}
  first = metrics.pop(AT_FIRST, None)
  if first is None or stale:
    return metrics
  return metrics | {AT_FIRST: made[0][AT_FIRST]}


def _log(
  log: Log,
  bells: Alarms,
  plan: TrainingSchedule,
  step: int,
  info: dict,
  metrics: dict,
  made: Sequence[dict],
  phases: Phases,
) -> None:
  """Args: made: the metrics of each update of the step."""
  with phases("update"):
    made = jax.device_get(made)
  joined = _joined(made, stale=plan.one_step_off and step > 0)
  metrics = {**metrics, **joined, **_staleness(plan, step)}
  # Numbers alone are metrics; arrays in info are for on_step.
  scalars = {k: v for k, v in info.items() if np.ndim(v) == 0}
  shown = {k: float(v) for k, v in {**scalars, **metrics}.items()}
  seconds = phases.taken()
  log.metrics(step + 1, shown, seconds)
  holding = bells.look(step + 1, shown)
  log.progress(step + 1, shown, note=f"({shares(seconds)}) {holding}".rstrip())


def _save(
  folder: str,
  plan: TrainingSchedule,
  done: int,
  state: TrainState,
  sampler: Params,
  phases: Phases,
) -> None:
  with phases("save"):
    kept = _with_sampler(state, sampler, plan)
    checkpoint.save(f"{folder}/checkpoints", kept, done, keep=plan.keep)


def _with_sampler(
  state: TrainState, sampler: Params, plan: TrainingSchedule
) -> TrainState:
  """The state as it is saved: one step off, with the params that sample next."""
  if not plan.one_step_off:
    return state
  return state._replace(opt_state={"optimizer": state.opt_state, "sampler": sampler})


def restored(
  folder: str, like: TrainState, plan: TrainingSchedule
) -> tuple[TrainState, Params]:
  """(state, the params that sample next) of a stage's last checkpoint."""
  at = f"{folder}/checkpoints"
  kept = checkpoint.restore(at, _with_sampler(like, like.params, plan))
  if not plan.one_step_off:
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
