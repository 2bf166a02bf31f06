"""The benchmark: what it counts, what it fills, and what it says of what it timed."""

import importlib.util
import pathlib
import time

import jax
import numpy as np
import pytest

from vlmrlaif_jax import bench, bench_model
from vlmrlaif_jax.models import clip, lora, quant

SMALL = bench_model.Size(
  llm=dict(vocab=64, embed=64, mlp=128, layers=2, heads=4, kv_heads=2),
  vision=clip.VARIANTS["tiny"],
  frames=3,
  rows=2,
  time=24,
  prompt=4,
  new=3,
  batches=(1, 2),
  warmup=0,
  repeats=1,
)


def asked(tmp_path=pathlib.Path(), **given):
  """What is to be measured, of the smallest model."""
  fields = dict(name="small", size=SMALL, base="bf16", what=("sft",), peer=False)
  fields |= dict(rank=2, attention="xla", scratch=tmp_path)
  return bench_model.Bench(**fields | given)


CLOCKED = bench.Timing(first=2.0, median=1.0)
MODEL = bench_model.model_of(asked())


def test_flops_are_those_of_every_matmul_by_hand():
  tokens, patches = 2 * 24, 2 * 3 * 16
  matrices = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
  layers = 2 * sum(2 * tokens * i * o for i, o in matrices)
  factors = 2 * sum(2 * tokens * 2 * (i + o) for i, o in matrices)
  logits = 2 * tokens * 64 * 64
  # Each of 2 rows and 2 layers: token t looks at t + 1 keys, and as many values.
  attention = 2 * 2 * sum(2 * 2 * 64 * (t + 1) for t in range(24))
  projector = 2 * patches * (32 * 64 + 64 * 64)
  model = 2 * (layers + logits) + 3 * (factors + attention) + projector
  found = bench_model.sft_flops(MODEL, rows=2, time=24, frames=3)
  assert found.model == model
  assert found.hardware == model + layers + factors + logits + attention


def test_model_without_video_is_spared_the_projector():
  of = lambda frames: bench_model.sft_flops(MODEL, rows=2, time=24, frames=frames)
  assert of(3).model - of(0).model == 2 * 2 * 3 * 16 * (32 * 64 + 64 * 64)


def test_lora_factors_are_counted_as_the_model_makes_them():
  flops = lambda rank: bench_model.sft_flops(
    bench_model.model_of(asked(rank=rank)), rows=1, time=1, frames=0
  )
  variables = jax.eval_shape(MODEL.init, jax.random.key(0), bench.batch_of(asked()))
  assert flops(2).model - flops(0).model == 6 * lora.count(variables["lora"])


def test_bytes_read_are_of_the_llm_but_its_embedding():
  # In bfloat16, q k v o and gate up down, two norms, in 2 layers; a norm; the head.
  layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
  shapes = bench_model.shapes_of(MODEL, "bf16")
  assert bench_model.bytes_read(shapes) == 2 * (2 * layer + 64 + 64 * 64)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_random_quantised_kernels_deviate_as_others_do(base):
  shapes = bench_model.shapes_of(MODEL, base)["quant"]["llm"]["blocks"]["down"]
  kernel = quant.dequantise(bench_model.random_weights(shapes))
  assert 0.015 < np.std(kernel) < 0.025


def test_random_norms_leave_their_input_as_it_is():
  shapes = bench_model.shapes_of(MODEL, "bf16")["params"]["llm"]["norm"]
  assert (bench_model.random_weights(shapes)["scale"] == 1).all()


def test_video_must_fit_into_the_rows():
  short = asked(size=SMALL._replace(time=20))  # 3 frames + 16 patches + 2 needed.
  with pytest.raises(ValueError, match="at least 21, not 20"):
    bench.batch_of(short)


def test_what_is_unknown_is_refused():
  with pytest.raises(ValueError, match=r"\['speed'\]"):
    next(bench.measure(asked(what=("sft", "speed"))))


def test_clock_leaves_out_the_first_runs():
  runs = []
  pause = lambda: (runs.append(0), time.sleep(0.05 if len(runs) < 4 else 0.0))
  timing = bench.clock(pause, warmup=2, repeats=5)
  assert timing.median < 0.05 <= timing.first and len(runs) == 1 + 2 + 5


def test_sft_is_timed_on_a_quantised_base(monkeypatch, compiled_once):
  zeros = lambda shapes: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  monkeypatch.setattr(bench, "random_weights", zeros)
  (row,) = bench.measure(asked(base="int8"))
  assert row["tokens_per_s"] == pytest.approx(2 * 24 / row["seconds"])
  assert row["base"] == "int8" and "mfu" not in row  # A CPU has no known ceiling.


def test_checkpoint_is_written_once_and_loaded(tmp_path, monkeypatch, compiled_once):
  monkeypatch.setattr(bench, "clock", lambda run, **_: (run(), CLOCKED)[1])
  wanted = asked(tmp_path, what=("load",))
  (row,) = bench.measure(wanted)
  written = tmp_path / "llava-small" / "model.safetensors"
  before = written.stat().st_mtime_ns
  assert row["bytes"] == written.stat().st_size
  bench.checkpoint_of(wanted)
  assert written.stat().st_mtime_ns == before


def test_decoding_is_told_apart_from_prefill(monkeypatch):
  monkeypatch.setattr(bench, "random_weights", lambda shapes: shapes)
  times = iter([1.0, 5.0, 2.0, 4.0])  # Of prefill and of the whole, by batch.
  clock = lambda run, **_: bench.Timing(0.0, next(times))
  monkeypatch.setattr(bench, "clock", clock)
  one, two = bench.measure(asked(what=("decode",)))
  assert one["tokens_per_s"] == 2 / 4  # 3 tokens, the first of them by prefill.
  assert two["tokens_per_s"] == 2 * 2 / 2


def test_share_of_the_ceiling_is_told_where_it_is_known(monkeypatch):
  monkeypatch.setitem(bench.CHIPS, "cpu", bench_model.Chip(1e12, 1e9))
  monkeypatch.setattr(bench, "random_weights", lambda shapes: shapes)
  times = iter([1.0, 2.0])
  clock = lambda run, **_: bench.Timing(0.0, next(times))
  monkeypatch.setattr(bench, "clock", clock)
  wanted = asked(what=("decode",), size=SMALL._replace(batches=(1,)))
  (row,) = bench.measure(wanted)
  # 2 steps in a second, each of which reads the weights once, of 1e9 bytes a second.
  assert row["of_bandwidth"] == pytest.approx(2 * row["bytes_per_step"] / 1e9)


def test_peer_decodes_as_many_tokens():
  one = asked(what=("decode",), size=SMALL._replace(batches=(2,)))
  (row,) = bench.peer_rows(one, "decode")
  assert row["by"] == "transformers" and row["rows"] == 2


def test_peer_without_peft_is_left_out_with_a_note(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setitem(bench.OURS, "sft", lambda asked: iter([{"by": "us"}]))
  assert list(bench.measure(asked(peer=True))) == [{"by": "us"}]
  assert "PEFT" in capsys.readouterr().err


def test_table_has_a_dash_for_what_was_not_measured():
  row = dict(what="sft", by="vlmrlaif_jax", rows=2, base="bf16")
  line = bench.table([row | dict(seconds=0.5, tokens_per_s=1234.0)]).splitlines()[-1]
  assert line == "| sft | 2 | vlmrlaif_jax | bf16 | 0.5 | - | - | 1,234 | - | - | - |"
