"""Speed of GRPO's update where a group shares its prompt, beside one row a response."""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perf.bench import clock
from perf.model import Bench, Size, model_of, patches_of, shapes_of
from perf.random_arrays import random_arrays
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch, Groups, MethodModels, Params
from vlmrlaif_jax.methods import grpo
from vlmrlaif_jax.models import projector, vlm
from vlmrlaif_jax.runtime import arrays
from vlmrlaif_jax.training import update

PAD, EOS, KEPT = 0, 1, 2  # Ids; from KEPT on they are words.


class Case(NamedTuple):
  """What an update is given."""

  prompts: int
  group: int  # Responses to each.
  prompt_len: int  # In tokens, those of the video included.
  response_len: int


class Timed(NamedTuple):
  """Seconds of an update, medians of what was taken in turns."""

  case: Case
  plain: float
  shared: float


def measure(bench: Bench, cases: list[Case], repeats: int) -> Iterator[Timed]:
  """Times each case, as soon as it is known; what compiles is not timed."""
  model = model_of(bench)
  base = random_arrays(shapes_of(model, bench.base))
  for case in cases:
    given = rollout(bench.size, case)
    both = [updates(model, base, case, given, shared) for shared in (False, True)]
    seconds = [[clock(run) for run in both] for _ in range(repeats + 1)][1:]
    yield Timed(case, *map(statistics.median, zip(*seconds, strict=True)))


def updates(
  model: vlm.VLM, base: Params, case: Case, given: grpo.GroupRollout, shared: bool
) -> Callable[[], Any]:
  """A step of GRPO's update, compiled; it returns when the device is done."""
  config = grpo.default_config()
  config.update(samples=case.group, advantage="oracle_ndcg", kl_coef=0.04)
  config.shared_prefix = shared
  method = grpo.make(
    config,
    MethodModels(policy=model),
    max_new=case.response_len,
    eos=EOS,
    pad=PAD,
    vocab=model.llm.vocab,
  )
  optimizer = update.default_config()
  optimizer.learning_rate = 3e-5
  tx = update.make_optimizer(optimizer, steps=1000)
  where = arrays.get_trainable_shapes(
    model, sharding.make_mesh(devices=jax.devices()[:1])
  )
  state = update.init_state(
    {"policy": arrays.initialize_params(where, jax.random.key(0))}, tx
  )
  step = jax.jit(update.make_update(method.loss, tx))
  args = (state, {"policy": base}, given)
  compiled = step.lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


def rollout(size: Size, case: Case) -> grpo.GroupRollout:
  """Responses as long as can be, of prompts without padding.

  Raises:
    ValueError: prompts too short for their video.
  """
  rng, patches = np.random.default_rng(0), patches_of(size)
  places = projector.count_pooled_tokens(size.frames, patches)
  if case.prompt_len <= places:
    raise ValueError(f"prompts must be over {places} tokens, not {case.prompt_len}")
  vocab, answers = size.llm["vocab"], (case.prompts, case.group, case.response_len)
  words = functools.partial(rng.integers, KEPT, vocab, dtype=np.int32)
  prompts = words((case.prompts, case.prompt_len))
  prompts[:, :places] = VIDEO_TOKEN
  shape = (case.prompts, size.frames, patches, size.vision["embed"])
  video = rng.standard_normal(shape, np.float32).astype(np.float16)
  real, said = np.ones(prompts.shape, bool), np.ones(answers, bool)
  groups = Groups(Batch(video, prompts, real, ~real), words(answers), said, said)
  logps = np.full(answers, -np.log(vocab), np.float32)
  advantages = rng.standard_normal(answers[:2], np.float32)
  made = grpo.GroupRollout(groups, logps, logps, advantages)
  return jax.tree.map(jnp.asarray, made)


def table(rows: list[Timed]) -> str:
  """Returns a row for each case, as Markdown."""
  lines = [
    [*case, f"{plain:.3g}", f"{shared:.3g}", f"{plain / shared:.2f}"]
    for case, plain, shared in rows
  ]
  columns = ["prompts", "G", "prompt", "response"]
  columns += ["a row each, s", "shared, s", "times faster"]
  return markdown_table(lines, columns)
