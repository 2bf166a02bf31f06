"""Speed with random weights: loading, LoRA fine-tuning, decoding; and of a peer.

Everything runs on one device. The peer, transformers and PEFT in PyTorch, goes first
and in processes of its own, which give back their memory: JAX keeps what it has taken.
"""

import concurrent.futures
import functools
import importlib.util
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Int

from vlmrlaif_jax import bench_model, build, convert, sharding, update
from vlmrlaif_jax.bench_model import CHIPS, Bench, random_weights, shapes_of
from vlmrlaif_jax.generate import generate
from vlmrlaif_jax.methods import sft
from vlmrlaif_jax.models import projector
from vlmrlaif_jax.types import VIDEO_TOKEN, Batch, Params, Parts

Row: TypeAlias = dict[str, Any]  # A line of the JSON file.

BASES = ("bf16", "nf4", "int8")
_NEVER = -1  # An id for the end that no sample has: all answers are equally long.


class Timing(NamedTuple):
  """Of one thing that was run again and again, in seconds."""

  first: float  # Compilation included.
  median: float  # Of those after warm-up.


def measure(bench: Bench) -> Iterator[Row]:
  """A row for each thing that was measured, as soon as it was.

  Raises:
    ValueError: an unknown base, or unknown things to measure.
  """
  if bench.base not in BASES:
    raise ValueError(f"base must be one of {BASES}, not {bench.base!r}")
  if unknown := sorted(set(bench.what) - set(OURS)):
    raise ValueError(f"what must be of {sorted(OURS)}, not {unknown}")
  if bench.peer:
    yield from _peer(bench)
  for what in bench.what:
    _tell(f"{what}, vlmrlaif_jax")
    yield from OURS[what](bench)


def _tell(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def clock(run: Callable[[], None], *, warmup: int, repeats: int) -> Timing:
  """The time that `run` takes; it is to return when the device is done."""
  seconds = []
  for _ in range(1 + warmup + repeats):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return Timing(seconds[0], statistics.median(seconds[1 + warmup :]))


# Ours.


def load(bench: Bench) -> Iterator[Row]:
  """From a checkpoint's files to weights on the device."""
  folder = checkpoint_of(bench)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  scheme = "none" if bench.base == "bf16" else bench.base

  def run():
    jax.block_until_ready(convert.load_llava(folder, quant=scheme, mesh=mesh)[1])

  timing = clock(run, warmup=0, repeats=2)
  yield _load_row(bench, _us(bench, bench.base), folder, timing)


def checkpoint_of(bench: Bench) -> Path:
  """A folder of random weights in Hugging Face's form, written unless it is there."""
  folder = bench.scratch / f"llava-{bench.name}"
  if not (folder / "config.json").exists():  # It is written last.
    model = bench_model.model_of(bench)
    params = random_weights(shapes_of(model, "bf16"))["params"]
    config = convert.llava_config(model, image_token=model.llm.vocab - 1)
    convert.save_llava(folder, params, config, dtype="bfloat16")
  return folder


def fine_tune(bench: Bench) -> Iterator[Row]:
  """Steps of LoRA fine-tuning of all matrices of the blocks, AdamW included."""
  model = bench_model.model_of(bench)
  base = random_weights(shapes_of(model, bench.base))
  where = build.trainable(model, sharding.make_mesh(devices=jax.devices()[:1]))
  tx = update.make_optimizer(update.default_config())
  state = update.init_state({"policy": build.fresh(where, jax.random.key(0))}, tx)
  method = sft.make(sft.default_config(), Parts(policy=model))
  step = jax.jit(update.make_update(method.loss, tx), donate_argnums=0)
  batch, frozen = jax.device_put(batch_of(bench)), {"policy": base}

  def run():
    nonlocal state
    state, _ = jax.block_until_ready(step(state, frozen, batch))

  timing = clock(run, warmup=bench.size.warmup, repeats=bench.size.repeats)
  yield _sft_row(bench, _us(bench, bench.base), timing, bench.size.frames)


def batch_of(bench: Bench) -> Batch:
  """Rows without padding: a video's features, a question, an answer of equal length.

  Raises:
    ValueError: rows too short for their video.
  """
  size, rng = bench.size, np.random.default_rng(0)
  patches = (size.vision["image"] // size.vision["patch"]) ** 2
  places = projector.pooled_tokens(size.frames, patches)
  if size.time < places + 2:
    raise ValueError(f"time must be at least {places + 2}, not {size.time}")
  tokens = rng.integers(0, size.llm["vocab"], (size.rows, size.time), np.int32)
  tokens[:, :places] = VIDEO_TOKEN
  mask = np.ones(tokens.shape, bool)
  answer = mask & (np.arange(size.time) >= (places + size.time) // 2)
  shape = (size.rows, size.frames, patches, size.vision["embed"])
  video = rng.standard_normal(shape, np.float32).astype(np.float16)
  return Batch(video, tokens, mask, answer)


def decode(bench: Bench) -> Iterator[Row]:
  """Greedy answers of one length to prompts of text, with and without the decoding."""
  model = bench_model.model_of(bench)
  shapes = shapes_of(model, bench.base)
  variables = random_weights(shapes)

  def answers(prompts: Int[np.ndarray, "batch time"], new: int):
    rows, real = len(prompts), np.ones(prompts.shape, bool)
    video = np.zeros((rows, 1, 1, model.vision.embed), np.float16)
    batch = jax.device_put(Batch(video, prompts, real, ~real))
    settings = dict(max_new=new, temperature=0.0, eos=_NEVER, pad=0)
    answer = jax.jit(functools.partial(generate, model, **settings))
    return lambda: jax.block_until_ready(answer(variables, batch, jax.random.key(0)))

  yield from _decode_rows(bench, _us(bench, bench.base), answers, shapes)


OURS = {"load": load, "sft": fine_tune, "decode": decode}


# The peer.


def _peer(bench: Bench) -> Iterator[Row]:
  """The same of PyTorch, as far as what it needs is installed."""
  if bench.base != "bf16":
    _tell(f"no peer: it is measured with --base=bf16, not with {bench.base}")
    return
  for what in bench.what:
    if what != "decode" and not importlib.util.find_spec("peft"):
      _tell(f'no peer for {what}: pip install -e ".[bench]" brings PEFT')
      continue
    _tell(f"{what}, transformers")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, _stay_on_cpu) as process:
      yield from process.submit(peer_rows, bench, what).result()


def _stay_on_cpu() -> None:
  """Or JAX, which the peer's process asks for shapes, would take most of the device."""
  jax.config.update("jax_platforms", "cpu")


def peer_rows(bench: Bench, what: str) -> list[Row]:
  """What `measure` tells of one thing that the peer does."""
  from vlmrlaif_jax import bench_peer as peer  # PyTorch is not needed otherwise.

  model = bench_model.model_of(bench)
  them = dict(by="transformers", device=peer.device_name(), software=peer.software())
  them |= {"base": "bf16", "attention": "sdpa"}
  if what == "load":
    folder = checkpoint_of(bench)
    timing = clock(lambda: peer.load(folder), warmup=0, repeats=2)
    return [_load_row(bench, them, folder, timing)]
  if what == "sft":
    batch = batch_of(bench)
    step = peer.sft_step(model.llm, np.maximum(batch.tokens, 0), batch.loss_mask)
    timing = clock(step, warmup=bench.size.warmup, repeats=bench.size.repeats)
    return [_sft_row(bench, them, timing, frames=0)]
  shapes = shapes_of(model, "bf16")
  return list(_decode_rows(bench, them, peer.answers_of(model.llm), shapes))


# Rows.


def _us(bench: Bench, base: str) -> Row:
  return {
    "by": "vlmrlaif_jax",
    "device": jax.devices()[0].device_kind,
    "software": f"jax {jax.__version__}",
    "base": base,
    "attention": bench_model.attention_of(bench),
  }


def _row(bench: Bench, what: str, by: Row, timing: Timing, **measured) -> Row:
  settings = bench._asdict() | {"size": bench.size._asdict()}
  for told in ("what", "peer", "scratch", "base"):
    del settings[told]
  times = {"first_seconds": timing.first, "seconds": timing.median}
  return {"what": what} | settings | by | times | measured


def _load_row(bench: Bench, by: Row, folder: Path, timing: Timing) -> Row:
  size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
  rate = size / timing.median / 1e9
  return _row(bench, "load", by, timing, rows=None, bytes=size, gb_per_s=rate)


def _sft_row(bench: Bench, by: Row, timing: Timing, frames: int) -> Row:
  rows, length = bench.size.rows, bench.size.time
  model = bench_model.model_of(bench)
  flops = bench_model.sft_flops(model, rows=rows, time=length, frames=frames)
  more = dict(rows=rows, tokens_per_s=rows * length / timing.median)
  more |= dict(model_flops=flops.model)
  if chip := CHIPS.get(by["device"]):
    more["mfu"] = flops.model / timing.median / chip.flops
  if frames:  # The peer does not recompute the logits.
    more |= dict(hardware_flops=flops.hardware)
    if chip:
      more["hfu"] = flops.hardware / timing.median / chip.flops
  return _row(bench, "sft", by, timing, **more)


def _decode_rows(bench: Bench, by: Row, answers, shapes: Params) -> Iterator[Row]:
  """A row for each batch; what one token takes is what prefill takes, nearly."""
  size, rng = bench.size, np.random.default_rng(0)
  timed = functools.partial(clock, warmup=size.warmup, repeats=size.repeats)
  read = bench_model.bytes_read(shapes)
  for rows in size.batches:
    prompts = rng.integers(3, size.llm["vocab"], (rows, size.prompt), np.int32)
    prefill = timed(answers(prompts, 1)).median
    timing = timed(answers(prompts, size.new))
    steps = (size.new - 1) / (timing.median - prefill)
    more = dict(rows=rows, prefill_seconds=prefill, tokens_per_s=steps * rows)
    more |= dict(bytes_per_step=read)
    if chip := CHIPS.get(by["device"]):
      more["of_bandwidth"] = steps * read / chip.bandwidth
    yield _row(bench, "decode", by, timing, **more)


COLUMNS = {  # Heading -> key of a row, and how its value is written.
  "what": ("what", "{}"),
  "rows": ("rows", "{}"),
  "by": ("by", "{}"),
  "base": ("base", "{}"),
  "seconds": ("seconds", "{:.3g}"),
  "prefill, s": ("prefill_seconds", "{:.3g}"),
  "GB/s": ("gb_per_s", "{:.2f}"),
  "tokens/s": ("tokens_per_s", "{:,.0f}"),
  "MFU": ("mfu", "{:.1%}"),
  "HFU": ("hfu", "{:.1%}"),
  "of bandwidth": ("of_bandwidth", "{:.1%}"),
}


def table(rows: list[Row]) -> str:
  """Markdown; what was not measured, or has no known ceiling, is a dash."""
  order = {what: i for i, what in enumerate(OURS)}
  lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
  for row in sorted(rows, key=lambda row: (order[row["what"]], row["rows"] or 0)):
    cells = [
      how.format(row[key]) if row.get(key) is not None else "-"
      for key, how in COLUMNS.values()
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)
