"""Times GRPO's update with a shared prompt, next to one row for each response."""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from perf.bench import time_call
from perf.model import Bench, Size, count_patches, get_shapes, make_model
from perf.random_arrays import make_random_arrays
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch, Groups, MethodModels, Params
from vlmrlaif_jax.data.processors.llava import count_pooled_tokens
from vlmrlaif_jax.methods import grpo
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import arrays
from vlmrlaif_jax.training import update

PAD, EOS, FIRST_WORD = 0, 1, 2  # Token ids; those from FIRST_WORD on are words.


class Case(NamedTuple):
  """The size of an update."""

  prompts: int
  group: int  # Responses to each prompt.
  prompt_len: int  # Tokens of a prompt, with its video tokens.
  response_len: int


class Timed(NamedTuple):
  """Median seconds of an update in both forms, which run in turns."""

  case: Case
  plain: float
  shared: float


def measure(bench: Bench, cases: list[Case], repeats: int) -> Iterator[Timed]:
  """Times each case and yields its result; compilation is not timed."""
  model = make_model(bench)
  base = make_random_arrays(get_shapes(model, bench.base))
  for case in cases:
    data = make_rollout(bench.size, case)
    both = [compile_update(model, base, case, data, shared) for shared in (False, True)]
    seconds = [[time_call(run) for run in both] for _ in range(repeats + 1)][1:]
    yield Timed(case, *map(statistics.median, zip(*seconds, strict=True)))


def compile_update(
  model: vlm.VLM, base: Params, case: Case, data: grpo.GroupRollout, shared: bool
) -> Callable[[], Any]:
  """Compiles GRPO's update. Returns a call that runs it and waits for the device."""
  config = grpo.default_config()
  config.update(samples=case.group, advantage="oracle_ndcg", kl_coef=0.04)
  config.shared_prefix = shared
  method = grpo.make(
    config,
    MethodModels(policy=model),
    max_new=case.response_len,
    stops=(EOS,),
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
  args = (state, {"policy": base}, data)
  compiled = step.lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


def make_rollout(size: Size, case: Case) -> grpo.GroupRollout:
  """Creates a rollout of full-length responses and prompts without padding.

  Raises:
    ValueError: A prompt is too short for its video.
  """
  rng, patches = np.random.default_rng(0), count_patches(size)
  places = count_pooled_tokens(size.frames, patches)
  if case.prompt_len <= places:
    raise ValueError(
      f"--lengths must be over {places} tokens, those of the video, got "
      f"{case.prompt_len}"
    )
  vocab, answers = size.llm["vocab"], (case.prompts, case.group, case.response_len)
  words = functools.partial(rng.integers, FIRST_WORD, vocab, dtype=np.int32)
  prompts = words((case.prompts, case.prompt_len))
  prompts[:, :places] = VIDEO_TOKEN
  shape = (case.prompts, size.frames, patches, size.vision["embed"])
  video = rng.standard_normal(shape, np.float32).astype(np.float16)
  real, full = np.ones(prompts.shape, bool), np.ones(answers, bool)
  count = lambda start, time: start + np.arange(time, dtype=np.int32)[:, None]
  at = np.tile(count(0, case.prompt_len), (case.prompts, 1, 1))
  answers_at = np.tile(count(case.prompt_len, answers[2]), (*answers[:2], 1, 1))
  batch = Batch(video, prompts, real, ~real, at)
  groups = Groups(batch, words(answers), full, full, answers_at)
  logps = np.full(answers, -np.log(vocab), np.float32)
  advantages = rng.standard_normal(answers[:2], np.float32)
  weights = np.ones(answers, np.float32)
  data = grpo.GroupRollout(groups, logps, logps, advantages, weights)
  return jax.tree.map(jnp.asarray, data)


def format_table(rows: list[Timed]) -> str:
  """Formats a row for each case, as Markdown."""
  lines = [
    [*case, f"{plain:.3g}", f"{shared:.3g}", f"{plain / shared:.2f}"]
    for case, plain, shared in rows
  ]
  columns = ["prompts", "G", "prompt", "response"]
  columns += ["a row each, s", "shared, s", "times faster"]
  return markdown_table(lines, columns)
