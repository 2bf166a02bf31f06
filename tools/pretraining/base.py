"""The parts of a base model that depend on its family."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmrlaif_jax.core.types import Method, Params
from vlmrlaif_jax.data.video import Reading
from vlmrlaif_jax.data.world.scene import Scene

PHASES = ("pretrain_image", "pretrain_see", "pretrain_judge")  # In training order.


class World(NamedTuple):
  """The videos of pretraining."""

  scenes: list[Scene]
  frames: UInt8[np.ndarray, "videos frames height width 3"]


class Base(NamedTuple):
  """A base model with random weights, and its method."""

  method: Method
  params: Params  # Trained parameters.
  frozen: Params
  # (phase, step) -> batch. A phase is its section with its name as "name".
  make_batch: Callable[[ConfigDict, int], Any]
  # (folder, params) -> None. Writes the model next to its tokenizer.
  export: Callable[[pathlib.Path, Params], None]


class Family(NamedTuple):
  """The functions that create a base model."""

  # (texts, vocab) -> tokenizer.
  train_tokenizer: Callable[[Iterable[str], int], PreTrainedTokenizerFast]
  # Config -> settings for reading videos.
  make_reading: Callable[[ConfigDict], Reading]
  make_base: Callable[[ConfigDict, PreTrainedTokenizerBase, World], Base]


def sample_rows(
  config: ConfigDict, phase: ConfigDict, step: int
) -> tuple[np.random.Generator, list[int]]:
  """Returns the random generator and the videos of a step.

  Both are pure functions of the seed, the phase and the step.
  """
  rng = np.random.default_rng([config.seed, PHASES.index(phase.name), step])
  return rng, rng.choice(config.videos, phase.batch_size, replace=False).tolist()
