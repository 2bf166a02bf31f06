"""The benchmark: what it runs, counts, fills, compares, and says of what it timed."""

import pathlib
import sys
import time

import jax
import numpy as np
import pytest

from perf import bench, docs, jobs, model, pages, peer, random_arrays
from tests.helpers.figures import check_figure
from vlmrlaif_jax.core.types import ModelPass
from vlmrlaif_jax.models import clip, lora
from vlmrlaif_jax.models.ops import quantization
from vlmrlaif_jax.planner import flops

SMALL = model.Size(
  llm=dict(vocab=64, embed=64, mlp=128, layers=2, heads=4, kv_heads=2),
  vision=clip.VARIANTS["tiny"],
  dtype="float32",
  remat="none",
  frames=3,
  question=5,
  new=4,
  rows=2,
  prompts=2,
  group=3,
)
PROMPT = 3 + 16 + 5  # Frames, patches of a frame, question.
NOBODY = peer.Peers({}, pathlib.Path())


def asked(tmp_path=pathlib.Path(), **given):
  """What is to be measured, of the smallest model."""
  fields = dict(name="small", size=SMALL, base="none", rank=2, attention="xla")
  return model.Bench(**fields | dict(scratch=tmp_path) | given)


MODEL = model.make_model(asked())


# What is counted.


def test_flops_are_those_of_every_matmul_by_hand():
  time = PROMPT + 4
  tokens, patches = 2 * time, 2 * 3 * 16
  matrices = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
  layers = 2 * sum(2 * tokens * i * o for i, o in matrices)
  factors = 2 * sum(2 * tokens * 2 * (i + o) for i, o in matrices)
  logits = 2 * (2 * 4) * 64 * 64  # Of the answers alone.
  # Each of 2 rows and 2 layers: token t looks at t + 1 keys, and as many values.
  attention = 2 * 2 * sum(2 * 2 * 64 * (t + 1) for t in range(time))
  projector = 2 * patches * (32 * 64 + 64 * 64)
  work = model.make_pass(MODEL, SMALL, 2)
  forward = layers + factors + logits + attention + projector
  assert model.count_forward_flops(work) == forward
  trained = 2 * (layers + logits) + 3 * (factors + attention) + projector
  assert model.count_training_flops(work) == trained


def test_a_group_reads_its_prompt_once():
  one = flops.count_forward_flops(model.make_pass(MODEL, SMALL, 2))
  three = flops.count_forward_flops(model.make_pass(MODEL, SMALL, 2, 3))
  answers, kernels = (
    2 * 2,
    flops.get_model_sizes(MODEL).kernels,
  )  # 2 more answers to 2 prompts.
  assert three.layers - one.layers == 2 * answers * 4 * kernels
  assert three.projector == one.projector
  # Each token of an answer looks at the prompt, at itself and what is before it.
  pairs = answers * sum(PROMPT + i + 1 for i in range(4))
  assert three.attention - one.attention == 4 * pairs * 2 * 64


def test_lora_factors_are_counted_as_the_model_makes_them():
  one = ModelPass("train", "policy", None, rows=1, time=1, logits=False)
  trained = lambda rank: model.count_training_flops(
    one._replace(model=model.make_model(asked(rank=rank)))
  )
  batch = model.make_batch(SMALL, 1, new=0)
  variables = jax.eval_shape(MODEL.init, jax.random.key(0), batch)
  assert trained(2) - trained(0) == 6 * lora.count_params(variables["lora"])


def test_decoding_reads_the_llm_but_its_embedding_and_the_cache():
  # In float32: q k v o and gate up down, two norms, in 2 layers; a norm; the head.
  layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
  cache = 3 * (PROMPT + 2) * 2 * 2 * 32  # 3 rows, half full of 4 new tokens.
  shapes = model.get_shapes(MODEL, "none")
  found = model.count_decode_bytes(shapes, MODEL, SMALL, 3)
  assert found == 4 * (2 * layer + 64 + 64 * 64 + cache)


# What is filled.


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_random_quantised_kernels_deviate_as_others_do(base):
  shapes = model.get_shapes(MODEL, base)["quant"]["llm"]["blocks"]["down"]
  kernel = quantization.dequantize(random_arrays.make_random_arrays(shapes))
  assert 0.015 < np.std(kernel) < 0.025


def test_rows_without_video_are_as_long():
  seen, read = (model.make_batch(SMALL, 2, new=4, video=v) for v in (True, False))
  assert seen.tokens.shape == read.tokens.shape == (2, PROMPT + 4)
  assert np.sum(seen.tokens == -1) == 2 * 19 and np.min(read.tokens) > 0


def test_checkpoint_is_written_once_and_loaded(tmp_path):
  wanted = asked(tmp_path)
  jobs.make_loading_job(wanted, video=True).all.run()
  written = tmp_path / "llava-small" / "model.safetensors"
  before = written.stat().st_mtime_ns
  jobs.ensure_checkpoint(wanted)
  assert written.stat().st_mtime_ns == before


# What is run.


@pytest.fixture
def zeros(monkeypatch):
  """Weights that are made at once."""
  make = lambda shapes: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  monkeypatch.setattr(jobs, "make_random_arrays", make)


TOKENS = {"dpo": 4 * (PROMPT + 4), "sample": 2 * 4}


@pytest.mark.parametrize("what", TOKENS)
def test_job_runs_again_and_again(what, zeros):
  job = jobs.JOBS[what](asked(), video=False)
  job.all.run(), job.all.run()
  assert job.tokens == TOKENS[what]


def test_step_of_a_group_samples_answers_of_full_length(zeros):
  job = jobs.make_grpo_job(asked(base="int8"), video=True)
  job.all.run(), job.all.run()
  job.parts["update"].run()
  assert job.tokens == 2 * 3 * 4


def test_ppo_learns_twice_as_much_as_a_group_but_for_logits():
  group, reward = (
    jobs.JOBS[what](asked(), video=True).parts["update"].flops
    for what in ("grpo", "ppo")
  )
  logits = 2 * (2 * 3 * 4) * 64 * 64  # The critic's answers have none.
  assert reward == 2 * group - 2 * logits


def test_sizes_fit_together():
  for size in model.SIZES.values():
    assert size.llm["embed"] % size.llm["heads"] == 0
    assert model.get_prompt_len(size) % 2 == 0  # The kernels of a GPU want it.


def test_what_is_unknown_is_refused():
  with pytest.raises(ValueError, match=r"\['speed'\]"):
    next(bench.measure(asked(), ("sft", "speed"), NOBODY, pairs=1))


def test_row_that_is_there_is_not_measured_again(monkeypatch):
  monkeypatch.setattr(bench, "measure_machine", lambda: {"bytes_per_s": 1.0})
  monkeypatch.setattr(bench, "compare_with_peer", lambda *_: {"ours": [1.0]})
  measure = lambda bench_, done: [
    row["what"]
    for row in bench.measure(bench_, ("machine", "sft"), NOBODY, pairs=1, done=done)
  ]
  done = list(bench.measure(asked(), ("machine", "sft"), NOBODY, pairs=1))
  assert measure(asked(), done) == []
  assert measure(asked(size=SMALL._replace(new=8)), done) == ["sft"]


# Peers.


PEER = """
import protocol
line = protocol.connect()
print("noise")
protocol.serve(line, lambda: {tokens}, software=line.job["software"])
"""


def peers(tmp_path, script):
  """A peer that runs this script, under the name of TRL."""
  folder = pathlib.Path(bench.__file__).parent / "peers"
  there = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
  (tmp_path / peer.SCRIPTS["trl"]).write_text(there + script)
  return peer.Peers({"trl": sys.executable}, tmp_path)


@pytest.fixture
def napping(monkeypatch):
  """A job of 10 tokens that takes a hundredth of a second."""
  nap = jobs.Part(lambda: time.sleep(0.01), 7)
  job = jobs.Job(nap, 10, {"update": nap})
  monkeypatch.setitem(jobs.JOBS, "sft", lambda *_, **__: job)
  named = lambda *_: {"software": "napper 1.0"}
  monkeypatch.setattr(peer, "describe_job", named)


def test_peer_runs_in_turn_with_ours(tmp_path, napping):
  there = peers(tmp_path, PEER.format(tokens=10))
  (row,) = bench.measure(asked(tmp_path), ("sft",), there, pairs=3)
  assert len(row["ours"]) == len(row["theirs"]) == 3
  assert min(row["ours"]) >= 0.01 > max(row["theirs"])
  assert row["peer_software"] == "napper 1.0"
  assert row["parts"]["update"]["flops"] == 7


def test_peer_that_takes_other_tokens_is_refused(tmp_path, napping):
  there = peers(tmp_path, PEER.format(tokens=9))
  with pytest.raises(ValueError, match="ours took 10 tokens, and the peer 9"):
    list(bench.measure(asked(tmp_path), ("sft",), there, pairs=1))


def test_peer_that_dies_is_told_of_by_its_last_words(tmp_path, napping):
  there = peers(tmp_path, "raise SystemExit('no such library')")
  with pytest.raises(RuntimeError, match="no such library"):
    list(bench.measure(asked(tmp_path), ("sft",), there, pairs=1))


def test_job_of_a_peer_is_numbers_and_words():
  job = peer.describe_job(asked(), "grpo")
  assert all(isinstance(value, int | str) for value in job.values())
  assert (job["prompt"], job["new"], job["group"]) == (PROMPT, 4, 3)


# Tables and figures.

ROW = dict(
  what="grpo", size="tiny", peer="trl", frames=12, dtype="float32", new=4, prompt=6
)
ROW |= dict(dtype="float32", tokens=60, flops=4e9)
ROW |= dict(ours=[1.0, 2.0, 4.0], theirs=[3.0, 2.0, 20.0])
ROW |= dict(first=9.0, first_theirs=1.0, step_bytes=0, device="cpu", date="2026-01-01")
ROW |= dict(machine="2 cores of X", software="jax 1", peer_software="trl 1")
ROW |= dict(parts={"update": dict(seconds=1.0, flops=2e9)})
PEAK = dict(what="machine", size="", peer="", device="cpu", bytes_per_s=1e9)
PEAK |= dict(flops_float32=8e9, flops_bfloat16=4e9)
CURVE = ROW | dict(what="curve", peer="new", points=[1, 2, 4], seconds=[1.0, 4.0, 16.0])
del CURVE["ours"], CURVE["theirs"]


def test_ratio_is_taken_pair_by_pair():
  assert docs.compute_ratios(ROW) == (3.0, 1.0, 5.0)
  line = docs.format_pairs([ROW, PEAK]).splitlines()[-1]
  assert "| 2 | 3 | **3.00** (1.00 to 5.00) | 30 | 20 | 9, 1 |" in line


def test_share_of_the_peak_is_of_the_type_that_is_computed_in():
  whole, update = docs.format_machine([ROW, PEAK]).splitlines()[-2:]
  assert "| grpo | 12 | 2 | 75 | 4 | 2 | 25% |" in whole
  assert "| grpo: update | 12 | 1 | - | 2 | 2 | 25% |" in update
  halved = ROW | dict(dtype="bfloat16")
  assert "50%" in docs.format_machine([halved, PEAK]).splitlines()[-1]


def test_decoding_is_told_apart_from_prefill():
  parts = {"prefill": dict(seconds=0.5, flops=1e9)}
  row = ROW | dict(what="sample", step_bytes=2.5e8, parts=parts)
  decode = docs.format_machine([row, PEAK]).splitlines()[-1]
  # 3 steps after the first token, in 1.5 s, each of which reads 0.25 GB of 1 a second.
  assert "| sample: decode | 12 | 1.5 | - | - | - | - | 0.5 | 50% |" in decode


def test_slope_of_a_square_is_two():
  assert docs.fit_slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_document_gets_tables_and_figures_between_its_markers(tmp_path):
  names = ("pairs", "machine", "curves", "made")
  path = tmp_path / "docs.md"
  marked = "".join(f"<!-- cpu-{n} -->\n<!-- end of cpu-{n} -->\n" for n in names)
  path.write_text(f"Before.\n{marked}After.\n")
  for _ in range(2):  # A second time changes nothing.
    docs.write_page(path, [PEAK, CURVE, ROW], "python perf/main.py")
    text = path.read_text()
  assert text.startswith("Before.\n") and text.endswith("After.\n")
  assert text.count("**3.00**") == 1 and "2.00 |" in text
  assert "2026-01-01, 2 cores of X, cpu; jax 1; trl 1." in text
  for name in ("bench_ratios", "bench_curves"):
    check_figure(tmp_path / "figures" / f"{name}.png")
    assert text.count(f"](figures/{name}.png)") == 1


def test_document_without_markers_is_refused():
  with pytest.raises(ValueError, match="cpu-pairs"):
    pages.replace_block("No marker.", "cpu-pairs", "")
