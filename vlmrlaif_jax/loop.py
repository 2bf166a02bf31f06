"""The training loop: data, experience, updates, log, checkpoints. The only one."""

import concurrent.futures
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax import checkpoint
from vlmrlaif_jax import update as updates
from vlmrlaif_jax.log import Log
from vlmrlaif_jax.types import Method, Params, TrainState


class Plan(NamedTuple):
  """How long to train, and how often to save, log and keep samples."""

  steps: int  # Of data: one batch, or one rollout, each.
  save_every: int
  log_every: int = 1
  keep: int = 1  # Checkpoints.
  epochs: int = 1  # Passes over the experience of a step.
  minibatches: int = 1  # Updates in each pass.


class Told(NamedTuple):
  """What a stage makes of a step, beside training on it."""

  frozen: Params  # To be laid over `frozen` from the next step on.
  metrics: dict[str, float]  # To be logged.


class Hooks(NamedTuple):
  """What a stage does beside training, and keeps beside its state."""

  # Before each step, with its number and the params: what to lay over `frozen`.
  before: Callable[[int, Params], Params] = lambda step, params: {}
  # After each step, with its number, its data and the info of collect.
  on_step: Callable[[int, Any, dict], Told] = lambda step, data, info: Told({}, {})
  extra: Callable[[], dict] = dict  # What to save beside the state.
  # Given that again, what is to be laid over `frozen`.
  restored: Callable[[dict], Params] = lambda extra: {}


NO_HOOKS = Hooks()


def prefetch(make: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
  """make(start), ..., make(stop - 1), each begun while the one before is used."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = pool.submit(make, start) if start < stop else None
    for step in range(start, stop):
      ready = ahead.result()
      if step + 1 < stop:
        ahead = pool.submit(make, step + 1)
      yield ready


def fit(
  *,
  method: Method,
  params: Params,
  frozen: Params,
  data: Callable[[int], Any],
  key: jax.Array,
  plan: Plan,
  optimizer: ConfigDict,
  place: Callable[[Any], Any],
  folder: str,
  log: Log,
  microbatches: int = 1,
  hooks: Hooks = NO_HOOKS,
) -> TrainState:
  """Trains params from the last checkpoint in the folder, or from its start.

  Args:
    optimizer: see update.default_config; its steps follow from the plan.
    place: state -> its shardings.
    microbatches: see update.make_update.
    The others: see train.
  """
  count = plan.steps * plan.epochs * plan.minibatches
  tx = updates.make_optimizer(ConfigDict({**optimizer, "steps": count}))
  # A copy, for updates donate it, and what it starts from may stay in use.
  make = lambda params: updates.init_state(jax.tree.map(jnp.copy, params), tx)
  # Rules also speak of the optimiser's copies of the parameters, by their paths.
  where = place(jax.eval_shape(make, params))
  state = jax.jit(make, out_shardings=where)(params)
  at = f"{folder}/checkpoints"
  if checkpoint.latest_step(at) is not None:
    state, extra = checkpoint.restore(at, state)
    frozen = {**frozen, **hooks.restored(extra)}
  update = jax.jit(
    updates.make_update(method.loss, tx, microbatches=microbatches),
    donate_argnums=0,
    in_shardings=(where, None, None),  # The others have theirs: frozen and data.
    out_shardings=(where, None),
  )
  return train(
    method=method,
    update=update,
    state=state,
    frozen=frozen,
    data=data,
    key=key,
    plan=plan,
    folder=folder,
    log=log,
    hooks=hooks,
  )


def train(
  *,
  method: Method,
  update: Callable,
  state: TrainState,
  frozen: Params,
  data: Callable[[int], Any],
  key: jax.Array,
  plan: Plan,
  folder: str,
  log: Log,
  hooks: Hooks = NO_HOOKS,
) -> TrainState:
  """Trains from the step that `state` stands at, and saves its last state.

  Args:
    update: jitted; (state, frozen, experience) -> (state, metrics).
    data: step -> one batch on the devices; a pure function of the step, so that a
      resumed run sees what an uninterrupted one would have.
    key: of all that is random; each step folds in its number.
    folder: of the stage; checkpoints go below it.
  """
  start = int(state.step) // (plan.epochs * plan.minibatches)
  if start < plan.steps:
    log.note(f"{log.stage}: compiling at the first step, from step {start}")
  for step, batch in enumerate(prefetch(data, start, plan.steps), start=start):
    now = jax.random.fold_in(key, step)
    frozen = {**frozen, **hooks.before(step, state.params)}
    experience, info = method.collect(now, state.params, frozen, batch)
    if experience is not batch:
      # A compiler that is left to choose may give every device all of its rows.
      experience = jax.device_put(experience, jax.tree.leaves(batch)[0].sharding)
    for part in _minibatches(experience, now, plan):
      state, metrics = update(state, frozen, part)
    # Numbers alone are metrics; arrays in info are for on_step.
    scalars = {k: v for k, v in info.items() if np.ndim(v) == 0}
    told = hooks.on_step(step, batch, info)
    frozen = {**frozen, **told.frozen}
    done = step + 1
    if done % plan.log_every == 0 or done == plan.steps:
      shown = {k: float(v) for k, v in {**scalars, **told.metrics, **metrics}.items()}
      log.metrics(done, shown)
      log.progress(done, shown)
    if done % plan.save_every == 0 or done == plan.steps:
      checkpoint.save(
        f"{folder}/checkpoints", state, done, extra=hooks.extra(), keep=plan.keep
      )
  return state


def _minibatches(experience: Any, key: jax.Array, plan: Plan) -> Iterator[Any]:
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
