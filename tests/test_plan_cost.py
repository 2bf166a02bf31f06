import jax
import jax.numpy as jnp
import pytest

from tests.small import VOCAB
from vlmrlaif_jax import bench_model, convert, plan_cost, topologies
from vlmrlaif_jax.models import clip, llama, vlm
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.plan_cost import Pass, Ways
from vlmrlaif_jax.types import Batch

ONE = Ways(rows=1, fsdp=1, tensor=1, time=1, devices=1)


def model(**fields):
  llm = llama.Model(**{**llama.VARIANTS["tiny"], "vocab": VOCAB, **fields})
  return vlm.VLM(clip.VisionTower(**clip.VARIANTS["tiny"]), Projector(llm.embed), llm)


def test_training_takes_what_the_benchmark_counts():
  made = model(rank=4, remat="full", attention="splash")
  ours = plan_cost.flops(Pass("train", "policy", made, rows=3, time=40, frames=2))
  theirs = bench_model.sft_flops(made, rows=3, time=40, frames=2)
  assert ours.model == pytest.approx(theirs.model)
  assert ours.hardware == pytest.approx(theirs.hardware)


def test_a_forward_takes_what_the_compiler_counts():
  made = model(
    layers=1, embed=128, mlp=256
  )  # Of one layer: it sees a scan's body once.
  tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
  real = jax.ShapeDtypeStruct((2, 64), bool)
  video = jax.ShapeDtypeStruct((2, 2, 16, 32), jnp.float32)
  variables = {"params": convert.param_shapes(made)}
  compiled = jax.jit(made.apply).lower(variables, Batch(video, tokens, real, real))
  counted = compiled.compile().cost_analysis()["flops"]
  ours = plan_cost.flops(Pass("forward", "policy", made, rows=2, time=64, frames=2))
  assert ours.hardware == pytest.approx(counted, rel=0.05)


def test_decoding_reads_weights_and_cache_at_each_step():
  made = model(layers=2)
  step = Pass("decode", "policy", made, rows=4, time=64, new=8)
  held = plan_cost.sizes(made).kernels * 4.0
  once = plan_cost.work(step._replace(new=1), held, ONE)
  work = plan_cost.work(step, held, ONE)
  assert work.bytes == pytest.approx(8 * once.bytes)
  assert once.bytes > held + plan_cost.cache_bytes(step, ONE)


def test_a_cache_is_keys_and_values_of_every_layer():
  made = model(layers=2, heads=4, kv_heads=2)  # Of 8 channels a head.
  step = Pass("decode", "policy", made, rows=4, time=10, new=2)
  assert plan_cost.cache_bytes(step, ONE) == 2 * 4 * 10 * 2 * (2 * 8) * 4


def test_microbatches_read_the_weights_more_often():
  made = model(remat="full")
  whole = Pass("train", "policy", made, rows=8, time=16)
  held = plan_cost.sizes(made).kernels * 4.0
  more = plan_cost.work(whole._replace(parts=4), held, ONE).bytes
  assert more - plan_cost.work(whole, held, ONE).bytes == pytest.approx(9 * held)


def test_fsdp_gathers_weights_and_tensor_adds_activations():
  made = model()
  one = Pass("forward", "policy", made, rows=8, time=16)
  held = plan_cost.sizes(made).kernels * 4.0
  gathers = Ways(rows=4, fsdp=4, tensor=1, time=1, devices=4)
  adds = Ways(rows=1, fsdp=1, tensor=4, time=1, devices=4)
  assert plan_cost.work(one, held, ONE).moved == 0
  assert plan_cost.work(one, held, gathers).moved == pytest.approx(held * 3 / 4)
  layer = 8 * 16 * 32 * 4
  added = plan_cost.work(one, held, adds).moved
  assert added == pytest.approx(2 * 2 * 2 * layer * 3 / 4)


def test_the_slowest_resource_bounds():
  chip = topologies.Chip(flops=1e12, memory=1e9, bandwidth=1e10, links=1e9, latency=0.0)
  work = plan_cost.Work(flops=1e12, bytes=3e10, moved=1e9, messages=5.0)
  taken = plan_cost.seconds(work, chip)
  assert (taken.longest, taken.bound) == (3.0, "memory")
