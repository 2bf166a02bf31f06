"""Speed of GRPO's update where a group shares its prompt, beside one row a response."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmrlaif_jax import bench_model, build, convert, sharding, update
from vlmrlaif_jax.methods import grpo
from vlmrlaif_jax.models import clip, llama, projector, vlm
from vlmrlaif_jax.types import VIDEO_TOKEN, Batch, Groups, Parts

SHAPES = {  # Of the language model.
  "tiny": dict(vocab=2048, embed=256, mlp=704, layers=2, heads=8, kv_heads=8),
  "100m": dict(vocab=8192, embed=768, mlp=2048, layers=12, heads=12, kv_heads=12),
}
FRAMES = 12
RANK = 16
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


def measure(shape: str, cases: list[Case], repeats: int) -> Iterator[Timed]:
  """Times each case, as soon as it is known; what compiles is not timed."""
  model = model_of(shape)
  base = bench_model.random_weights({"params": convert.param_shapes(model)})
  for case in cases:
    both = [updates(model, base, case, shared) for shared in (False, True)]
    seconds = [[_seconds(run) for run in both] for _ in range(repeats + 1)][1:]
    yield Timed(case, *map(statistics.median, zip(*seconds, strict=True)))


def model_of(shape: str) -> vlm.VLM:
  """A model whose tower does not run: videos are features."""
  llm = llama.Model(**SHAPES[shape], rank=RANK, alpha=2.0 * RANK)
  tower = clip.VisionTower(**clip.VARIANTS["tiny"])
  return vlm.VLM(tower, projector.Projector(llm.embed), llm)


def updates(model: vlm.VLM, base: Any, case: Case, shared: bool) -> Callable[[], None]:
  """A step of GRPO's update, compiled; it returns when the device is done."""
  config = grpo.default_config()
  config.update(samples=case.group, shared_prefix=shared)
  method = grpo.make(
    config,
    Parts(policy=model),
    max_new=case.response_len,
    eos=EOS,
    pad=PAD,
    vocab=model.llm.vocab,
  )
  tx = update.make_optimizer(update.default_config())
  where = build.trainable(model, sharding.make_mesh(devices=jax.devices()[:1]))
  state = update.init_state({"policy": build.fresh(where, jax.random.key(0))}, tx)
  step = jax.jit(update.make_update(method.loss, tx))
  given = (state, {"policy": base}, rollout(model, case))
  compiled = step.lower(*given).compile()
  return lambda: jax.block_until_ready(compiled(*given))


def rollout(model: vlm.VLM, case: Case) -> grpo.GroupRollout:
  """Responses as long as can be, of prompts without padding.

  Raises:
    ValueError: prompts too short for their video.
  """
  rng, size = np.random.default_rng(0), (case.prompts, case.group, case.response_len)
  patches = (model.vision.image // model.vision.patch) ** 2
  places = projector.pooled_tokens(FRAMES, patches)
  if case.prompt_len <= places:
    raise ValueError(f"prompts must be over {places} tokens, not {case.prompt_len}")
  words = functools.partial(rng.integers, KEPT, model.llm.vocab, dtype=np.int32)
  prompts = words((case.prompts, case.prompt_len))
  prompts[:, :places] = VIDEO_TOKEN
  shape = (case.prompts, FRAMES, patches, model.vision.embed)
  video = rng.standard_normal(shape, np.float32).astype(np.float16)
  real, said = np.ones(prompts.shape, bool), np.ones(size, bool)
  groups = Groups(Batch(video, prompts, real, ~real), words(size), said, said)
  logps = np.full(size, -np.log(model.llm.vocab), np.float32)
  advantages = rng.standard_normal(size[:2], np.float32)
  made = grpo.GroupRollout(groups, logps, logps, advantages)
  return jax.tree.map(jnp.asarray, made)


def _seconds(run: Callable[[], None]) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def table(rows: list[Timed]) -> str:
  """Markdown."""
  lines = [
    "| prompts | G | prompt | response | a row each, s | shared, s | times faster |",
    "|---|---|---|---|---|---|---|",
  ]
  lines += [
    "| "
    + " | ".join(map(str, row.case))
    + f" | {row.plain:.3g} | {row.shared:.3g} | {row.plain / row.shared:.2f} |"
    for row in rows
  ]
  return "\n".join(lines)
