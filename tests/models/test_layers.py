import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from tests.helpers.rows import text_batch
from tests.losses.whole_logits import token_logps
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.models import clip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.layers import (
  Dense,
  RMSNorm,
  RopeScaling,
  rope,
  scale_frequencies,
)
from vlmrlaif_jax.models.ops import quantization
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.sampling.generate import generate


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def dense():
  """A layer with a LoRA update that has been trained, its variables and an input."""
  layer, x = Dense(6, bias=True, rank=2, alpha=8.0), normal(0, 3, 4)
  variables = layer.init(jax.random.key(1), x)
  variables["lora"]["b"] = normal(2, 2, 6)
  return layer, variables, x


def test_linear_scaling_divides_all_frequencies():
  got = scale_frequencies(jnp.array([1.0, 0.1]), RopeScaling("linear", 4.0))
  np.testing.assert_allclose(got, [0.25, 0.025])


def test_llama3_scaling_divides_only_channels_with_few_turns():
  # Turns within a context of 200 pi tokens: 100, 2.5 and 0.5; from 1 to 4 is between.
  scaling = RopeScaling("llama3", 8.0, low=1.0, high=4.0, context=628)
  frequency = jnp.array([100, 2.5, 0.5]) * 2 * np.pi / 628
  got = scale_frequencies(frequency, scaling) / frequency
  np.testing.assert_allclose(got, [1, 0.5 + 0.5 / 8, 1 / 8], rtol=1e-5)


def test_unknown_scaling_is_refused():
  with pytest.raises(ValueError, match="linear.*llama3.*'yarn'"):
    scale_frequencies(jnp.ones(2), RopeScaling("yarn", 2.0))


def test_dense_equals_its_formula(dense):
  layer, variables, x = dense
  p, lora = variables["params"], variables["lora"]
  want = x @ (p["kernel"] + 8.0 / 2 * lora["a"] @ lora["b"]) + p["bias"]
  np.testing.assert_allclose(layer.apply(variables, x), want, atol=1e-5)


def test_dense_adds_the_update_of_an_earlier_stage(dense):
  layer, variables, x = dense
  frozen = {"a": normal(5, 4, 3), "b": normal(6, 3, 6)}
  want = layer.apply(variables, x) + x @ frozen["a"] @ frozen["b"]
  got = layer.apply({**variables, "frozen_lora": frozen}, x)
  np.testing.assert_allclose(got, want, atol=1e-5)
  alone = layer.apply({"params": variables["params"], "frozen_lora": frozen}, x)
  without = layer.apply({"params": variables["params"]}, x)
  np.testing.assert_allclose(alone, without + x @ frozen["a"] @ frozen["b"], atol=1e-5)


def test_dropout_is_of_the_inputs_of_the_update_alone(dense):
  layer, variables, x = dense
  dropped = layer.clone(dropout=0.25)
  apply = lambda key: dropped.apply(variables, x, rngs={"dropout": key})
  outputs = jax.vmap(apply)(jax.random.split(jax.random.key(3), 4000))
  want = layer.apply(variables, x)
  np.testing.assert_array_equal(dropped.apply(variables, x), want)
  assert np.std(outputs, axis=0).min() > 0.1
  np.testing.assert_allclose(np.mean(outputs, axis=0), want, atol=0.2)
  without = {"params": variables["params"]}
  np.testing.assert_array_equal(
    dropped.apply(without, x, rngs={"dropout": jax.random.key(0)}),
    layer.apply(without, x),
  )


def test_lora_starts_as_that_of_peft():
  layer = Dense(6, rank=500)
  start = layer.init(jax.random.key(1), normal(0, 3, 40))["lora"]["a"]
  base = torch.nn.Sequential(torch.nn.Linear(40, 6))
  config = peft.LoraConfig(r=500, target_modules=["0"])
  theirs = (
    peft.get_peft_model(base, config).base_model.model[0].lora_A["default"].weight
  )
  for measure in (np.max, np.min, np.std):
    want = measure(theirs.detach().numpy())
    np.testing.assert_allclose(measure(start), want, rtol=0.03)


def test_dense_leaves_the_update_out_without_the_lora_collection(dense):
  layer, variables, x = dense
  p = variables["params"]
  want = x @ p["kernel"] + p["bias"]
  np.testing.assert_allclose(layer.apply({"params": p}, x), want, atol=1e-6)


def test_dense_keeps_lora_in_float32_when_the_kernel_is_not():
  layer = Dense(6, rank=2, dtype="bfloat16", param_dtype="bfloat16")
  variables = layer.init(jax.random.key(0), normal(0, 3, 4))
  assert variables["params"]["kernel"].dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(variables["lora"])} == {np.dtype("float32")}


def test_rms_norm_equals_numpy():
  x, scale = normal(0, 5, 8), normal(1, 8)
  want = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-2) * scale
  got = RMSNorm(1e-2).apply({"params": {"scale": scale}}, x)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_rope_turns_channel_pairs_like_complex_numbers():
  x, positions = np.asarray(normal(0, 1, 3, 2, 8)), np.array([[0, 1, 7]])
  pairs = x[..., :4] + 1j * x[..., 4:]
  frequency = 100.0 ** (-np.array([0, 2, 4, 6]) / 8)
  turned = pairs * np.exp(1j * positions[..., None, None] * frequency)
  want = np.concatenate([turned.real, turned.imag], -1)
  got = rope(jnp.asarray(x), jnp.asarray(positions)[..., None], base=100.0)
  np.testing.assert_allclose(got, want, atol=1e-6)


# Quantised matrices in a whole model, whose batch four devices divide.


def quantised_vlm():
  shape = dict(vocab=16, embed=256, mlp=256, layers=1, heads=4, kv_heads=2, rank=2)
  llm = llama.Model(**shape, remat="full")
  return vlm.VLM(clip.VisionTower(**clip.VARIANTS["tiny"]), Projector(256), llm)


def random_variables():
  """Of quantised_vlm, the kernels of the language model's layers quantised."""
  draw = lambda x: 0.1 * np.random.default_rng(x.size).normal(size=x.shape)
  shapes = vlm.get_variable_shapes(quantised_vlm())
  made = jax.tree.map(lambda x: draw(x).astype(np.float32), shapes)
  base = quantization.quantize_params(
    made["params"], llama.QUANTIZED, scheme="nf4_double"
  )
  return {**base, "lora": made["lora"]}


def questions():
  """4 of them, each of a frame's 16 tokens and some words."""
  tokens = np.random.default_rng(0).integers(3, 16, (4, 20))
  tokens[:, 1:17] = VIDEO_TOKEN
  real = np.ones(tokens.shape, bool)
  return text_batch(np.asarray(normal(1, 4, 1, 16, 32)), tokens, real, real)


def results(*sizes):
  """Logits, LoRA's gradient, and what is sampled, on a mesh of these sizes."""
  model = quantised_vlm()
  settings = dict(max_new=3, temperature=1.0, stops=(2,), pad=0, samples=2)

  @jax.jit
  def compute(variables, batch):
    def loss(lora):
      logits = model.apply({**variables, "lora": lora}, batch)
      return jnp.sum(token_logps(logits, batch.tokens)), logits

    grads, logits = jax.grad(loss, has_aux=True)(variables["lora"])
    sampled = generate(model, variables, batch, jax.random.key(0), **settings)
    return (logits, grads, sampled.logps), sampled.batch.tokens

  data, fsdp, tensor = sizes
  devices = jax.devices()[: np.prod(sizes)]
  mesh = sharding.make_mesh(data, fsdp, tensor=tensor, devices=devices)
  whole = random_variables()
  places = sharding.shard_by_rules(whole, vlm.SHARDING, mesh)
  with jax.set_mesh(mesh):
    placed = jax.device_put(whole, places), sharding.shard_batch(questions(), mesh)
    return jax.device_get(compute(*placed))


def test_a_quantised_vlm_learns_and_writes_the_same_on_a_mesh():
  (want, tokens), (got, same) = results(1, 1, 1), results(2, 2, 1)
  np.testing.assert_array_equal(same, tokens)
  assert len(np.unique(tokens[:, 20:])) > 4
  near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  jax.tree.map(near, got, want)
