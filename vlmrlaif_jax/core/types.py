"""The data that flows through the project, as plain NamedTuples of arrays.

One convention holds everywhere: index t of a per-token array speaks of token t.
`logps[t]` is log p(tokens[t] | tokens[<t]) and `values[t]` the value of the
state in which token t was chosen; index 0, which nothing predicts, holds 0. Of a
group's responses, t is counted from the response's first token, which the prompt
predicts.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

Params: TypeAlias = PyTree  # Nested dict of arrays, as Flax makes it.
AnyArray: TypeAlias = Array | np.ndarray  # NumPy's on the host, JAX's on devices.
Metrics: TypeAlias = dict[str, Array]  # Name -> scalar.
Phase: TypeAlias = Callable[[str], AbstractContextManager]  # See profiling.Phases.

VIDEO_TOKEN = -1  # Where a video feature goes. No vocabulary holds it: never sampled.


class Batch(NamedTuple):
  """Token sequences and the video each one speaks of."""

  video: (
    UInt8[AnyArray, "batch frames height width 3"]  # Pixels, or
    | Float[AnyArray, "batch frames patches channels"]  # the vision tower's features.
  )
  tokens: Int[AnyArray, "batch time"]  # VIDEO_TOKEN repeated where video features go.
  mask: Bool[AnyArray, "batch time"]  # True where a token is real, not padding.
  loss_mask: Bool[AnyArray, "batch time"]  # True where a token is of the response.


class PackedBatch(NamedTuple):
  """Examples behind one another in rows; each is a segment, and sees itself alone."""

  # Features; 0 if unused.
  video: Float[AnyArray, "batch videos frames patches channels"]
  # Which of a row's videos a segment speaks of.
  video_of: Int[AnyArray, "batch segments"]
  tokens: Int[AnyArray, "batch time"]  # As a Batch's, without padding within a segment.
  segments: Int[AnyArray, "batch time"]  # Counted from 1 in each row; 0 is padding.
  loss_mask: Bool[AnyArray, "batch time"]  # True where a token is of a response.


class Groups(NamedTuple):
  """Prompts, and a group of responses to each; what a group shares is held once.

  Preferences are groups of two, the chosen response and then the rejected one.
  """

  prompts: Batch  # Padded on the left, so that all end at the same place.
  tokens: Int[AnyArray, "prompts group time"]  # Of the responses.
  mask: Bool[AnyArray, "prompts group time"]
  loss_mask: Bool[AnyArray, "prompts group time"]


class ComparedPairs(NamedTuple):
  """Preferences, and what a reference thinks of both answers."""

  pairs: Groups
  ref_logps: Float[AnyArray, "prompts 2"]  # Of whole responses, chosen and rejected.


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


class ModelPass(NamedTuple):
  """A model run once over a batch, or over parts of it in turn.

  The planner counts operations and bytes from these numbers.
  """

  phase: str  # "encode", "prefill", "decode", "forward" or "train".
  role: str  # Role in `frozen` whose weights are read.
  model: Any  # A VLM.
  rows: int  # Rows of the batch; of groups, their prompts.
  time: int  # Tokens of a prompt and a response; when decoding, slots of the cache.
  new: int = 0  # Tokens to decode.
  logits: bool = True  # Whether logits are computed; False for scalar heads.
  frames: int = 0  # Frames of each row's video that the projector reads.
  parts: float = 1  # Microbatches; when decoding, rows for each slot.
  chunk: int = 128  # Time steps whose logits exist at once.
  start: int = 0  # Tokens of the prompt, for which no logits are computed.
  group: int = 1  # Responses in a row, which share one prompt.


def _no_score(
  frozen: Params, batch: Batch
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
  raise ValueError("Parts.score must be set for a method that scores responses")


class MethodModels(NamedTuple):
  """What a method is made from; stages/training builds it from the config.

  score: (frozen, batch) -> the score of each response, and whether it is valid.
  Rows of one prompt stand together, so a scorer may compare them.
  """

  policy: Any = None  # Flax modules.
  critic: Any = None
  reward_model: Any = None
  score: Callable[
    [Params, Batch], tuple[Float[Array, " batch"], Bool[Array, " batch"]]
  ] = _no_score


def ignore_phase(phase: str) -> AbstractContextManager:
  """A Phase that books nothing."""
  return nullcontext()


@dataclasses.dataclass(frozen=True)  # A function to JAX, which a tuple is not.
class Collector:
  """How experience is made, in two parts.

  Between them, other work can be given to the device.

  begin: (key, params, frozen, data) -> sampled. It does not wait for the device.
  finish: (params, frozen, sampled, phase) -> (experience, info), from the same params.
    It waits for what was sampled in the phase "sample", and for scores in "score".
  """

  begin: Callable[[Array, Params, Params, Any], Any]
  finish: Callable[[Params, Params, Any, Phase], tuple[Any, dict[str, Array]]]

  def __call__(
    self, key: Array, params: Params, frozen: Params, data: Any
  ) -> tuple[Any, dict[str, Array]]:
    sampled = self.begin(key, params, frozen, data)
    return self.finish(params, frozen, sampled, ignore_phase)


class Method(NamedTuple):
  """A training method: what it reads, what it collects, what it minimises.

  reads: Batch or Groups; what the data pipeline is to make.
  collect: (key, params, frozen, data) -> (experience, info), and its two parts. What
    was sampled, judged and weighed, and a dict of what is worth telling of it: numbers
    are logged, arrays with a row for each response go to the samples. `offline` for a
    method that learns from the data as it is.
  loss: (params, frozen, experience) -> Loss. Pure; gets jitted.
  """

  reads: type
  collect: Collector
  loss: Callable[[Params, Params, Any], Loss]


offline = Collector(
  begin=lambda key, params, frozen, data: data,
  finish=lambda params, frozen, data, phase: (data, {}),
)


def group_rows(batch: Batch, *, group: int, start: int) -> Groups:
  """Rows as groups, each of `group` rows in turn: of one prompt, which ends at `start`.

  Args:
    batch: rows of one group stand together.
    group: responses to each prompt.
    start: the index of the responses' first tokens.
  """
  video, *columns = (x.reshape(-1, group, *x.shape[1:]) for x in batch)
  prompts = Batch(video[:, 0], *(x[:, 0, :start] for x in columns))
  return Groups(prompts, *(x[:, :, start:] for x in columns))


def flatten_groups(groups: Groups) -> Batch:
  """A row for each response, behind its prompt: what `grouped` makes groups of."""
  count, group, _ = groups.tokens.shape
  repeat = lambda x: jnp.repeat(x, group, axis=0)
  rows = lambda prompt, response: jnp.concatenate(
    [repeat(prompt), response.reshape(count * group, -1)], axis=1
  )
  video, *columns = groups.prompts
  return Batch(repeat(video), *map(rows, columns, groups[1:]))


def merge_params(frozen: Params, trained: Params) -> Params:
  """Variables with the trained leaves laid over the frozen ones, path by path."""
  if not isinstance(trained, dict) or not isinstance(frozen, dict):
    return trained
  both = {**frozen, **trained}
  return {
    k: merge_params(frozen[k], trained[k]) if k in frozen and k in trained else v
    for k, v in both.items()
  }


def has_stop(batch: Batch, eos: int) -> Bool[Array, " batch"]:
  """Whether a response came to its end."""
  return jnp.any((batch.tokens == eos) & batch.loss_mask, axis=1)
