"""The data that flows through the project, as plain NamedTuples of arrays.

One convention holds everywhere: index t of a per-token array speaks of token t.
`logps[t]` is log p(tokens[t] | tokens[<t]) and `values[t]` the value of the
state in which token t was chosen; index 0, which nothing predicts, holds 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

Params: TypeAlias = PyTree  # Nested dict of arrays, as Flax makes it.
Metrics: TypeAlias = dict[str, Array]  # Name -> scalar.

VIDEO_TOKEN = -1  # Where a video feature goes. No vocabulary holds it: never sampled.


class Batch(NamedTuple):
  """Token sequences and the video each one speaks of."""

  video: (
    UInt8[Array, "batch frames height width 3"]  # Pixels, or
    | Float[Array, "batch frames patches channels"]  # the vision tower's features.
  )
  tokens: Int[Array, "batch time"]  # VIDEO_TOKEN repeated where video features go.
  mask: Bool[Array, "batch time"]  # True where a token is real, not padding.
  loss_mask: Bool[Array, "batch time"]  # True where a token is of the response.


class Pairs(NamedTuple):
  """Preferences: row i of `chosen` was preferred to row i of `rejected`."""

  chosen: Batch
  rejected: Batch


class ComparedPairs(NamedTuple):
  """Preferences, and what a reference thinks of both answers."""

  pairs: Pairs
  ref_logps: Float[Array, "batch 2"]  # Of whole responses, chosen and rejected.


class Rollout(NamedTuple):
  """Sampled responses and all that a policy loss needs to know of them."""

  batch: Batch
  old_logps: Float[Array, "batch time"]  # Under the policy that sampled.
  ref_logps: Float[Array, "batch time"]  # Under the frozen reference policy.
  old_values: Float[Array, "batch time"]
  advantages: Float[Array, "batch time"]
  returns: Float[Array, "batch time"]


class TrainState(NamedTuple):
  """What a checkpoint holds. Frozen weights are not in it."""

  step: Int[Array, ""]
  params: Params  # Only what is trained: LoRA factors, projector, heads.
  opt_state: PyTree


@jax.tree_util.register_pytree_node_class
class Frozen(dict):
  """Weights by role, of which an array that stands in several is handed over once.

  A jitted function has an argument for each leaf. Given the base once for each role
  that shares it, a compiler counts it as often, and refuses what would fit.
  """

  def tree_flatten(self):
    leaves, tree = jax.tree.flatten(dict(self))
    once = {id(leaf): leaf for leaf in leaves}
    places = {key: place for place, key in enumerate(once)}
    return list(once.values()), (tree, tuple(places[id(leaf)] for leaf in leaves))

  @classmethod
  def tree_unflatten(cls, kept, leaves):
    tree, places = kept
    return cls(jax.tree.unflatten(tree, [leaves[place] for place in places]))


class Loss(NamedTuple):
  """A mean, and over how many items (tokens, pairs) it was taken.

  Means of parts of a batch are joined by weight, so that splitting a batch
  never changes its gradient.
  """

  mean: Float[Array, ""]
  weight: Float[Array, ""]
  metrics: Metrics  # Means over the same items.


class Parts(NamedTuple):
  """What a method is made from; train.py builds it from the config.

  score: (frozen, batch) -> the score of each response, and whether it is valid.
  Rows of one prompt stand together, so a scorer may compare them.
  """

  policy: Any = None  # Flax modules.
  critic: Any = None
  reward_model: Any = None
  score: (
    Callable[[Params, Batch], tuple[Float[Array, " batch"], Bool[Array, " batch"]]]
    | None
  ) = None


class Method(NamedTuple):
  """A training method: what it reads, what it collects, what it minimises.

  reads: Batch or Pairs; what the data pipeline is to make.
  collect: (key, params, frozen, data) -> (experience, info). What was sampled, judged
    and weighed, and a dict of what is worth telling of it: numbers are logged,
    arrays with a row for each response go to the samples. `offline` for a method
    that learns from the data as it is.
  loss: (params, frozen, experience) -> Loss. Pure; gets jitted.
  """

  reads: type
  collect: Callable[[Array, Params, Params, Any], tuple[Any, dict[str, Array]]]
  loss: Callable[[Params, Params, Any], Loss]


def offline(
  key: Array, params: Params, frozen: Params, data: Any
) -> tuple[Any, dict[str, Array]]:
  """The collect of a method that learns from the data as it is."""
  return data, {}


def join(frozen: Params, trained: Params) -> Params:
  """Variables with the trained leaves laid over the frozen ones, path by path."""
  if not isinstance(trained, dict) or not isinstance(frozen, dict):
    return trained
  both = {**frozen, **trained}
  return {
    k: join(frozen[k], trained[k]) if k in frozen and k in trained else v
    for k, v in both.items()
  }
