"""Creates the optimizer, and the update step from a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import check_at_least, check_choices
from vlmrlaif_jax.core.types import DROPOUT_KEY, Loss, Metrics, Params, TrainState

Schedule = Callable[[Float[Array, ""]], Float[Array, ""]]

# Functions from the progress after warm-up, 0 to 1, to a factor of the learning rate.
SCHEDULES: dict[str, Schedule] = {
  "constant": jnp.ones_like,
  "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
}


def default_config() -> ConfigDict:
  """Returns the optimizer's settings; see make_optimizer."""
  return ConfigDict(
    {
      "learning_rate": placeholder(float),  # The maximum.
      "schedule": "constant",  # After warm-up: "constant", or "cosine" down to 0.
      "warmup_steps": 0,  # Updates of linear warm-up; 0 disables.
      "weight_decay": 0.0,
      "clip_norm": 1.0,  # Maximum norm of the whole gradient; inf disables.
      "b1": 0.9,
      "b2": 0.999,
    }
  )


def check(config: ConfigDict, steps: int) -> None:
  """Checks the optimizer's settings.

  Args:
    config: See default_config.
    steps: Total number of updates.

  Raises:
    ValueError: A value is invalid. The message starts with the setting's name.
  """
  check_choices(config, {"schedule": SCHEDULES})
  check_at_least(config, {"learning_rate": 0, "weight_decay": 0, "clip_norm": 0})
  if not 0 <= config.warmup_steps < steps:
    raise ValueError(
      f"warmup_steps must be from 0 to below the {steps} updates, not "
      f"{config.warmup_steps}: lower it, or train more steps"
    )


def make_optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
  """Returns AdamW (Loshchilov & Hutter 2019, 1711.05101) after clipping by norm.

  Weight decay excludes norms, biases and arrays with one axis.

  Args:
    config: See default_config.
    steps: Total number of updates, after which "cosine" ends.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      _make_learning_rate(config, steps),
      b1=config.b1,
      b2=config.b2,
      weight_decay=config.weight_decay,
      mask=_select_decayed,
    ),
  )


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first update."""
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def make_update(
  loss: Callable[[Params, Params, Any], Loss],
  tx: optax.GradientTransformation,
  *,
  microbatches: int = 1,
  dropout_key: Key[Array, ""] | None = None,
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]:
  """Returns an update step that descends the gradient of a loss.

  Args:
    loss: (params, frozen, experience) -> Loss.
    tx: The optimizer.
    microbatches: Number of equal parts of the experience whose gradients are computed
      in turn, to save memory. Gradient and metrics do not depend on it, except by the
      samples of dropout.
    dropout_key: Random key of dropout, which the loss receives in `frozen`, different
      for each update and part; None disables dropout.

  Returns:
    update: (state, frozen, experience) -> (state, metrics). It is pure. Jit it and
    donate the state. Every leaf of the experience has the batch as its first axis. The
    metrics are those of the loss, `loss`, `grad_norm` (before clipping), `skipped` and
    `update_ratio`: the norm of the change, relative to that of the parameters unless
    these are 0. `skipped` is 1 if the gradient or the change is not finite, or the loss
    has no items. Such an update changes the step number only.
  """

  def update(state, frozen, experience):
    keys = None
    if dropout_key is not None:
      keys = jax.random.split(jax.random.fold_in(dropout_key, state.step), microbatches)
    parts = keys, _split_batch(experience, microbatches)
    sum_one = lambda part: _sum_part(loss, state.params, frozen, *part)
    shapes = jax.eval_shape(sum_one, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, sum_one(part)), None)
    (grads, metrics, weight), _ = jax.lax.scan(add, zeros, parts)

    divisor = jnp.where(weight > 0, weight, 1.0)
    grads, metrics = jax.tree.map(lambda x: x / divisor, (grads, metrics))
    grad_norm = optax.tree.norm(grads)
    is_applied = jnp.isfinite(grad_norm) & (weight > 0)
    state, ratio, is_applied = _apply_gradient(state, grads, tx, is_applied)
    metrics["grad_norm"] = grad_norm
    metrics["update_ratio"] = ratio
    metrics["skipped"] = 1.0 - is_applied
    return state, metrics

  return update


def _sum_part(
  loss: Callable[[Params, Params, Any], Loss],
  params: Params,
  frozen: Params,
  key: Key[Array, ""] | None,
  part: Any,
) -> tuple[Params, Metrics, Float[Array, ""]]:
  """Computes weight * gradient, weight * metrics and weight of a part, in float32."""
  frozen = frozen if key is None else {**frozen, DROPOUT_KEY: key}

  def compute_mean(params):
    out = loss(params, frozen, part)
    return out.mean, out

  grads, out = jax.grad(compute_mean, has_aux=True)(params)
  weight = out.weight.astype(jnp.float32)

  def scale(x):
    # A part without items has an undefined mean.
    return jnp.where(weight > 0, weight * x.astype(jnp.float32), 0.0)

  metrics = {**out.metrics, "loss": out.mean}
  return jax.tree.map(scale, grads), jax.tree.map(scale, metrics), weight


def _apply_gradient(
  state: TrainState,
  grads: Params,
  tx: optax.GradientTransformation,
  is_applied: Bool[Array, ""],
) -> tuple[TrainState, Float[Array, ""], Bool[Array, ""]]:
  """Returns the next state, the change relative to the params, and `is_applied`.

  The params and opt_state are the old ones unless `is_applied` and the change is
  finite. The relative change of a gradient that is not applied is 0.
  """
  # The optimizer's state takes its dtypes from the gradient and must not change them.
  grads = optax.tree.cast_like(grads, state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  size = optax.tree.norm(state.params)
  change = optax.tree.norm(updates) / jnp.where(size > 0, size, 1.0)
  ratio = jnp.where(is_applied, change, 0.0)
  is_applied &= jnp.isfinite(ratio)
  params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(is_applied, new, old),
    (params, opt_state),
    (state.params, state.opt_state),
  )
  return TrainState(state.step + 1, params, opt_state), ratio, is_applied


def _split_batch(experience: PyTree, microbatches: int) -> PyTree:
  """Reshapes each leaf from [batch ...] to [microbatches batch/microbatches ...].

  Part i takes rows i, i + microbatches, and so on. Rows of a sharded batch then stay
  on their devices. Contiguous parts would each be on a few devices.
  """
  sizes = {x.shape[:1] for x in jax.tree.leaves(experience)}
  if len(sizes) != 1 or () in sizes:
    raise ValueError(
      "every leaf of the experience must have the same batch as its first axis, not "
      f"{sorted(sizes)}"
    )
  ((rows,),) = sizes
  if microbatches < 1 or rows % microbatches:
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    raise ValueError(
      f"a batch of {rows} rows does not split into {microbatches} microbatches of "
      f"equal size: set microbatches to one of {divisors}, or the batch to a multiple"
    )

  def split(x):
    x = x.reshape(rows // microbatches, microbatches, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  return jax.tree.map(split, experience)


def _make_learning_rate(
  config: ConfigDict, steps: int
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
  """Returns the function from the number of past updates to the next rate."""
  check(config, steps)
  shape = SCHEDULES[config.schedule]
  peak, warmup = config.learning_rate, config.warmup_steps

  def learning_rate(count):
    # count + 1: an update at rate 0 would waste a batch.
    rise = jnp.minimum((count + 1) / max(warmup, 1), 1.0)
    progress = jnp.clip((count - warmup) / (steps - warmup), 0.0, 1.0)
    return peak * rise * shape(progress)

  return learning_rate


def _select_decayed(params: Params) -> PyTree:
  """Returns True for the leaves that weight decay applies to.

  The number of axes does not suffice: biases of scanned layers have two.
  """

  def is_matrix(path, leaf):
    name = sharding.format_key_path(path).lower()
    is_bias = name.endswith(("bias", "scale"))
    return leaf.ndim > 1 and "norm" not in name and not is_bias

  return jax.tree_util.tree_map_with_path(is_matrix, params)
