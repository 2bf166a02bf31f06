"""From a loss to an update step, and the optimiser it takes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import check_at_least, check_choices
from vlmrlaif_jax.core.types import Loss, Metrics, Params, TrainState

Schedule = Callable[[Float[Array, ""]], Float[Array, ""]]


# Each from the progress after warm-up, 0 to 1, to a part of the learning rate.
SCHEDULES: dict[str, Schedule] = {
  "constant": jnp.ones_like,
  "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
}


def default_config() -> ConfigDict:
  """The optimiser's settings; see make_optimizer."""
  return ConfigDict(
    {
      "learning_rate": placeholder(float),  # At its highest.
      "schedule": "constant",  # After warm-up: "constant", or "cosine" down to 0.
      "warmup_steps": 0,  # Of linear rise.
      "weight_decay": 0.0,
      "clip_norm": 1.0,  # Of the whole gradient; inf to leave it as it is.
      "b1": 0.9,
      "b2": 0.999,
    }
  )


def check(config: ConfigDict, steps: int) -> None:
  """Checks the optimizer's settings.

  Args:
    config: see default_config.
    steps: updates in all.

  Raises:
    ValueError: a value is wrong. The message starts with the setting's name.
  """
  check_choices(config, {"schedule": SCHEDULES})
  check_at_least(config, {"learning_rate": 0, "weight_decay": 0, "clip_norm": 0})
  if not 0 <= config.warmup_steps < steps:
    raise ValueError(
      f"warmup_steps must be from 0 to below the {steps} updates, not "
      f"{config.warmup_steps}: lower it, or take more steps"
    )


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
  """AdamW, Loshchilov & Hutter 2019 (1711.05101), of a gradient clipped by norm.

  Weight decay leaves out norms, biases and whatever has one axis.

  Args:
    config: see default_config.
    steps: updates in all, where "cosine" ends.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      _learning_rate(config, steps),
      b1=config.b1,
      b2=config.b2,
      weight_decay=config.weight_decay,
      mask=_decayed,
    ),
  )


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def make_update(
  loss: Callable[[Params, Params, Any], Loss],
  tx: optax.GradientTransformation,
  *,
  microbatches: int = 1,
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]:
  """A step that moves params down the gradient of loss.

  Args:
    loss: (params, frozen, experience) -> Loss.
    tx: the optimiser.
    microbatches: into how many parts of equal rows the experience is split, to
      bound memory. Neither the gradient nor the metrics depend on it.

  Returns:
    update: (state, frozen, experience) -> (state, metrics). Pure; jit it, with the
    state donated. Every leaf of the experience has the batch as its first axis. To
    the metrics of the loss it adds `loss`, `grad_norm` (before clipping) and
    `skipped`: 1 for a step that changed nothing but its number, since its gradient
    was not finite or it had no item to learn from.
  """

  def totals(params, frozen, part):
    """(weight * gradient, weight * metrics, weight) of one part, in float32."""

    def mean_of(params):
      out = loss(params, frozen, part)
      return out.mean, out

    grads, out = jax.grad(mean_of, has_aux=True)(params)
    weight = out.weight.astype(jnp.float32)

    def scale(x):
      # A part without items has no mean: whatever stands there does not count.
      return jnp.where(weight > 0, weight * x.astype(jnp.float32), 0.0)

    metrics = {**out.metrics, "loss": out.mean}
    return jax.tree.map(scale, grads), jax.tree.map(scale, metrics), weight

  def update(state, frozen, experience):
    parts = _split(experience, microbatches)
    one = lambda part: totals(state.params, frozen, part)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None)
    (grads, metrics, weight), _ = jax.lax.scan(add, zeros, parts)

    divisor = jnp.where(weight > 0, weight, 1.0)
    grads, metrics = jax.tree.map(lambda x: x / divisor, (grads, metrics))
    grad_norm = optax.tree.norm(grads)
    learns = jnp.isfinite(grad_norm) & (weight > 0)
    metrics["grad_norm"] = grad_norm
    metrics["skipped"] = 1.0 - learns
    return _apply(state, grads, tx, learns), metrics

  return update


def _apply(
  state: TrainState,
  grads: Params,
  tx: optax.GradientTransformation,
  learns: Bool[Array, ""],
) -> TrainState:
  """The state after a step; with the old params and opt_state unless it learns."""
  # The optimiser's state must keep its dtypes, and takes them from the gradient.
  grads = optax.tree.cast_like(grads, state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(learns, new, old),
    (params, opt_state),
    (state.params, state.opt_state),
  )
  return TrainState(state.step + 1, params, opt_state)


def _split(experience: PyTree, microbatches: int) -> PyTree:
  """[batch ...] -> [microbatches batch/microbatches ...], leaf by leaf.

  Part i takes every microbatches-th row, from row i on: rows of a sharded batch
  then stay on their devices, where contiguous parts would each sit on a few.
  """
  sizes = {x.shape[:1] for x in jax.tree.leaves(experience)}
  if len(sizes) != 1 or () in sizes:
    raise ValueError(
      "every leaf of the experience must have the same batch as its first axis; "
      f"theirs are {sorted(sizes)}"
    )
  ((rows,),) = sizes
  if microbatches < 1 or rows % microbatches:
    fitting = [n for n in range(1, rows + 1) if rows % n == 0]
    raise ValueError(
      f"a batch of {rows} rows does not split into {microbatches} microbatches of "
      f"equal size: set microbatches to one of {fitting}, or the batch to a multiple"
    )

  def split(x):
    x = x.reshape(rows // microbatches, microbatches, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  return jax.tree.map(split, experience)


def _learning_rate(
  config: ConfigDict, steps: int
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
  """From the number of steps taken to the learning rate of the next one."""
  check(config, steps)
  shape = SCHEDULES[config.schedule]
  peak, warmup = config.learning_rate, config.warmup_steps

  def learning_rate(taken):
    # taken + 1: a first step at rate 0 would be a batch thrown away.
    rise = jnp.minimum((taken + 1) / max(warmup, 1), 1.0)
    progress = jnp.clip((taken - warmup) / (steps - warmup), 0.0, 1.0)
    return peak * rise * shape(progress)

  return learning_rate


def _decayed(params: Params) -> PyTree:
  """True for leaves that weight decay pulls to 0.

  By name as well as by axes: stacked over scanned layers, a bias has two.
  """

  def is_matrix(path, leaf):
    name = sharding.format_key_path(path).lower()
    is_bias = name.endswith(("bias", "scale"))
    return leaf.ndim > 1 and "norm" not in name and not is_bias

  return jax.tree_util.tree_map_with_path(is_matrix, params)
