import jax
import jax.numpy as jnp
import pytest

from tests.helpers.small import VOCAB
from vlmrlaif_jax.core.types import Batch, ModelPass
from vlmrlaif_jax.models import clip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.planner import flops, roofline, topologies
from vlmrlaif_jax.planner.roofline import MeshSplit

ONE = MeshSplit(rows=1, fsdp=1, tensor=1, time=1)


def model(**fields):
  llm = llama.Model(**{**llama.VARIANTS["tiny"], "vocab": VOCAB, **fields})
  return vlm.VLM(clip.VisionTower(**clip.VARIANTS["tiny"]), Projector(llm.embed), llm)


def test_training_takes_what_has_to_be_computed_and_remat_again():
  made = model(rank=4, remat="full", attention="splash")
  one = ModelPass("train", "policy", made, rows=3, time=40, frames=2)
  ours, parts = roofline.count_pass_flops(one), flops.count_forward_flops(one)
  assert ours.model == flops.count_training_flops(parts)
  again = parts.layers + parts.factors + parts.attention + parts.logits
  assert ours.hardware == pytest.approx(ours.model + again)


def test_a_group_reads_its_prompt_once_and_has_logits_of_responses():
  made = model(rank=4)
  one = ModelPass("forward", "policy", made, rows=2, time=40, frames=2, start=24)
  shared = roofline.count_pass_flops(one._replace(group=3))
  apart = roofline.count_pass_flops(one._replace(rows=6))
  prompts = roofline.count_pass_flops(one._replace(time=24, start=0, logits=False))
  assert apart.model - shared.model == 2 * prompts.model
  logits = 2 * 6 * (40 - 24) * 32 * VOCAB
  mute = roofline.count_pass_flops(one._replace(group=3, logits=False))
  assert shared.model - mute.model == logits


@pytest.mark.parametrize(
  "attention, pairs",
  [
    ("xla", 24 * 24 + 3 * 16 * 40),
    ("chunked", 24 * 25 // 2 + 3 * 16 * 40),
    ("splash", 3 * 40 * 41 // 2),  # Copies of the prompt, as rows of their own.
  ],
)
def test_a_backend_multiplies_what_its_rows_make_it(attention, pairs):
  made = model(attention=attention)
  one = ModelPass("forward", "policy", made, rows=2, time=40, start=24, group=3)
  found = roofline.count_pass_flops(one)
  causal = 24 * 25 // 2 + 3 * (16 * 24 + 16 * 17 // 2)
  each = 4 * 2 * made.llm.layers * roofline.get_model_sizes(made).width
  assert found.hardware - found.model == each * (pairs - causal)


def test_a_forward_takes_what_the_compiler_counts():
  made = model(
    layers=1, embed=128, mlp=256
  )  # Of one layer: it sees a scan's body once.
  tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
  real = jax.ShapeDtypeStruct((2, 64), bool)
  video = jax.ShapeDtypeStruct((2, 2, 16, 32), jnp.float32)
  variables = {"params": vlm.get_param_shapes(made)}
  positions = jax.ShapeDtypeStruct((2, 64, 1), jnp.int32)
  batch = Batch(video, tokens, real, real, positions)
  compiled = jax.jit(made.apply).lower(variables, batch)
  counted = compiled.compile().cost_analysis()["flops"]
  ours = roofline.count_pass_flops(
    ModelPass("forward", "policy", made, rows=2, time=64, frames=2)
  )
  assert ours.hardware == pytest.approx(counted, rel=0.05)


def test_decoding_reads_weights_and_cache_at_each_step():
  made = model(layers=2)
  step = ModelPass("decode", "policy", made, rows=4, time=64, new=8)
  held = roofline.get_model_sizes(made).kernels * 4.0
  once = roofline.compute_work(step._replace(new=1), held, ONE)
  work = roofline.compute_work(step, held, ONE)
  assert work.bytes == pytest.approx(8 * once.bytes)
  assert once.bytes > held + roofline.count_cache_bytes(step, ONE)


def test_a_cache_is_keys_and_values_of_every_layer():
  made = model(layers=2, heads=4, kv_heads=2)  # Of 8 channels a head.
  step = ModelPass("decode", "policy", made, rows=4, time=10, new=2)
  assert roofline.count_cache_bytes(step, ONE) == 2 * 4 * 10 * 2 * (2 * 8) * 4


def test_microbatches_read_the_weights_more_often():
  made = model(remat="full")
  whole = ModelPass("train", "policy", made, rows=8, time=16)
  held = roofline.get_model_sizes(made).kernels * 4.0
  more = roofline.compute_work(whole._replace(parts=4), held, ONE).bytes
  assert more - roofline.compute_work(whole, held, ONE).bytes == pytest.approx(9 * held)


def test_fsdp_gathers_weights_and_tensor_adds_activations():
  made = model()
  one = ModelPass("forward", "policy", made, rows=8, time=16)
  held = roofline.get_model_sizes(made).kernels * 4.0
  gathers = MeshSplit(rows=4, fsdp=4, tensor=1, time=1)
  adds = MeshSplit(rows=1, fsdp=1, tensor=4, time=1)
  assert roofline.compute_work(one, held, ONE).received_bytes == 0
  assert roofline.compute_work(one, held, gathers).received_bytes == pytest.approx(
    held * 3 / 4
  )
  layer = 8 * 16 * 32 * 4
  added = roofline.compute_work(one, held, adds).received_bytes
  assert added == pytest.approx(2 * 2 * 2 * layer * 3 / 4)


def test_slots_decode_in_turn_with_a_smaller_cache():
  whole = ModelPass("decode", "policy", model(), rows=8, time=64, new=8)
  parts = whole._replace(parts=4)
  held = roofline.get_model_sizes(whole.model).kernels * 4.0
  assert roofline.count_pass_flops(parts) == roofline.count_pass_flops(whole)
  assert (
    roofline.count_cache_bytes(parts, ONE) == roofline.count_cache_bytes(whole, ONE) / 4
  )
  assert (
    roofline.compute_work(parts, held, ONE).bytes
    > roofline.compute_work(whole, held, ONE).bytes
  )


def test_context_divides_rows_and_gathers_keys_and_values():
  one = ModelPass("forward", "policy", model(), rows=8, time=16)
  held = roofline.get_model_sizes(one.model).kernels * 4.0
  apart = MeshSplit(rows=1, fsdp=1, tensor=1, time=2)
  alone, spread = (roofline.compute_work(one, held, ways) for ways in (ONE, apart))
  assert spread.flops == alone.flops / 2
  size = roofline.get_model_sizes(one.model)
  kv = 8 * 16 * 2 * size.kv_width * 4 * one.model.llm.layers
  assert (alone.received_bytes, spread.received_bytes) == (0, kv / 2)
  decode = one._replace(phase="decode", new=4)  # One token: each does it all.
  assert roofline.compute_work(decode, held, apart) == roofline.compute_work(
    decode, held, ONE
  )


def test_on_a_cpu_what_stands_between_products_adds_to_them():
  host = topologies.Host(
    flops=5e11, weight_bandwidth=1e10, activation_bandwidth=2e9, allocation_seconds=1e-9
  )
  chip = topologies.Chip(1e12, 1e9, 1e10, 1e9, 0.0, host=host)
  work = roofline.Work(1e12, 4e10, 0.0, 0.0, activation_bytes=1e10, allocated_bytes=1e9)
  taken = roofline.estimate_seconds(work, chip)
  assert taken == (2.0, 3.0, 0.0, 6.0) and taken.seconds == 9.0


def test_the_slowest_resource_bounds():
  chip = topologies.Chip(flops=1e12, memory=1e9, bandwidth=1e10, links=1e9, latency=0.0)
  work = roofline.Work(flops=1e12, bytes=3e10, received_bytes=1e9, messages=5.0)
  taken = roofline.estimate_seconds(work, chip)
  assert (taken.seconds, taken.bound) == (3.0, "memory")
