import functools
import gc
import re

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from tests.helpers.rows import text_batch, text_positions
from tests.losses.whole_logits import token_logps
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import merge_params
from vlmrlaif_jax.models import clip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.layers import Dense
from vlmrlaif_jax.models.ops import quantization
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.sampling.generate import generate

# Appendix E of QLoRA (2305.14314), as printed there.
PAPER = """-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0"""

SHAPE = dict(vocab=32, embed=128, mlp=256, heads=4, kv_heads=2, rank=2)
MODEL = llama.Model(**SHAPE, layers=2, remat="full")
MASK = jnp.array([[False, True, True, True], [True] * 4])


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


INPUTS = (jnp.asarray(normal(0, 2, 4, 128)), text_positions(MASK), MASK)


def random_variables(model, *inputs):
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return jax.tree.map(lambda x: jnp.asarray(0.1 * normal(x.size, *x.shape)), shapes)


VARIABLES = random_variables(MODEL, *INPUTS)
PARAMS, LORA = VARIABLES["params"], VARIABLES["lora"]
each_scheme = pytest.mark.parametrize("scheme", quantization.SCHEMES)


@functools.partial(jax.jit, static_argnames="scheme")
def quantised(params, scheme):
  return quantization.quantize_params(params, llama.QUANTIZED, scheme=scheme)


apply = jax.jit(MODEL.apply)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=1)
def value_and_grad(base, lora):
  return jnp.vdot(MODEL.apply({**base, "lora": lora}, *INPUTS), normal(1, 2, 4, 128))


def size(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kernels_of(base):
  """Shapes of the dequantised kernels."""
  return jax.eval_shape(
    quantization.restore_quantized, {"params": {}, "quant": base["quant"]}
  )


def test_nf4_levels_are_those_of_the_paper():
  want = np.array([float(x) for x in PAPER.split(",")], np.float32)
  np.testing.assert_array_equal(quantization.NF4, want)


def test_nf4_levels_are_quantiles_of_a_gaussian():
  # Eight above zero, seven below; the outermost is half-way to the end of both.
  end = 1 - (1 / 32 + 1 / 30) / 2
  above, below = (norm.ppf(np.linspace(0.5, end, n)[1:]) for n in (9, 8))
  want = np.array([*-below[::-1], 0, *above]) / above[-1]
  np.testing.assert_allclose(quantization.NF4, want, atol=1e-6)


def test_nf4_packs_the_halves_of_a_block_in_a_byte():
  # Scale 2; the inputs of the one output stand for codes 0, 1, .., 15, 0, 1, .. but
  # the last 32 backwards.
  ordered = np.tile(np.arange(16), 2)
  kernel = 2 * quantization.NF4[[*ordered, *ordered[::-1]]][:, None]
  leaves = quantization.quantize_nf4(kernel)
  np.testing.assert_array_equal(leaves["codes"][:, 0], ordered + 16 * ordered[::-1])
  np.testing.assert_array_equal(leaves["block_scale"], [[2]])


def test_nf4_keeps_what_it_can_represent():
  codes = np.random.default_rng(0).integers(0, 16, (3, 2, 64, 5))
  codes[:, :, 7] = 15  # Every block has a largest weight.
  scale = np.exp(normal(1, 3, 2, 1, 5)).astype(jnp.bfloat16).astype(np.float32)
  kernel = (quantization.NF4[codes] * scale).reshape(3, 128, 5)
  np.testing.assert_array_equal(
    quantization.dequantize(quantization.quantize_nf4(kernel)), kernel
  )


def test_int8_keeps_what_it_can_represent():
  codes = np.random.default_rng(0).integers(-127, 128, (3, 9, 5))
  codes[:, 4] = -127
  kernel = codes * np.exp2(np.arange(-9, -4, dtype=np.float32))
  np.testing.assert_array_equal(
    quantization.dequantize(quantization.quantize_int8(kernel)), kernel
  )


def test_nf4_takes_the_nearest_of_the_levels():
  kernel = normal(0, 128, 3)
  largest = np.abs(kernel.reshape(2, 64, 3)).max(1).astype(jnp.bfloat16)
  levels = np.repeat(np.float32(largest), 64, axis=0)[..., None] * quantization.NF4
  want = np.abs(levels - kernel[..., None]).min(-1)
  got = np.abs(quantization.dequantize(quantization.quantize_nf4(kernel)) - kernel)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_int8_is_off_by_half_a_step_at_most():
  kernel = normal(0, 256, 32)
  step = np.max(np.abs(kernel), axis=0) / 127
  error = np.abs(quantization.dequantize(quantization.quantize_int8(kernel)) - kernel)
  assert (error <= 0.5001 * step).all()
  assert (error.max(axis=0) > 0.45 * step).all()


@pytest.mark.parametrize("outputs", [512, 96])  # Two groups of 256; three of 32.
def test_double_quantised_scales_are_off_by_half_a_step_at_most(outputs):
  kernel = normal(0, 2, 128, outputs) * np.exp(normal(1, 2, 1, outputs))
  largest = np.abs(kernel.reshape(2, 2, 64, outputs)).max(2)
  leaves = quantization.quantize_nf4(kernel, double=True)
  step = leaves["scale_step"]
  assert leaves["block_scale"].dtype == jnp.int8
  assert step.shape == (2, 2, {512: 2, 96: 3}[outputs])
  code = leaves["block_scale"].reshape(*step.shape, -1) * step[..., None]
  scale = code + leaves["scale_mean"][:, None, None, None]
  error = np.abs(scale - largest.reshape(scale.shape)) / step[..., None]
  assert 0.4 < error.max() < 0.501


@pytest.mark.parametrize(
  ("scheme", "low", "high"),
  [("nf4", 0.088, 0.096), ("nf4_double", 0.088, 0.096), ("int8", 0.0065, 0.0085)],
)
def test_error_of_gaussian_weights_is_as_stated(scheme, low, high):
  kernel = normal(0, 1024, 512)
  error = quantization.dequantize(quantization.SCHEMES[scheme](kernel)) - kernel
  assert low < np.linalg.norm(error) / np.linalg.norm(kernel) < high


@each_scheme
def test_zeros_stay_zero(scheme):
  kernel = normal(0, 128, 4)
  kernel[:64], kernel[:, 1] = 0, 0
  got = quantization.dequantize(quantization.SCHEMES[scheme](kernel))
  assert (got[:64] == 0).all() and (got[:, 1] == 0).all()
  assert np.isfinite(got).all() and (got[64:, 0] != 0).any()


@each_scheme
def test_numpy_and_jax_give_the_same(scheme):
  kernel = normal(0, 2, 128, 6)
  host, device = (
    quantization.SCHEMES[scheme](x) for x in (kernel, jnp.asarray(kernel))
  )
  assert not any(isinstance(x, jax.Array) for x in host.values())
  chex.assert_trees_all_close(host, device, rtol=1e-5)
  chex.assert_trees_all_equal_dtypes(host, device)
  kernels = quantization.dequantize(host), quantization.dequantize(device)
  np.testing.assert_allclose(*kernels, rtol=1e-5, atol=1e-6)


@each_scheme
def test_layers_may_be_quantised_one_by_one(scheme):
  kernel = normal(0, 3, 64, 6)
  one_by_one = [quantization.SCHEMES[scheme](layer) for layer in kernel]
  stacked = jax.tree.map(lambda *layers: np.stack(layers), *one_by_one)
  chex.assert_trees_all_close(stacked, quantization.SCHEMES[scheme](kernel), rtol=1e-6)


def test_nf4_refuses_what_blocks_do_not_divide():
  with pytest.raises(ValueError, match=r"multiple of 64, not one of shape \(96, 8\)"):
    quantization.quantize_nf4(np.ones((96, 8), np.float32))


def test_quantise_moves_the_kernels_of_blocks_alone():
  got = quantised(PARAMS, "int8")
  flat = functools.partial(flax.traverse_util.flatten_dict, sep="/")
  before, after = flat(PARAMS), flat(got["params"])
  gone = {f"blocks/{x}/kernel" for x in ("q", "k", "v", "o", "gate", "up", "down")}
  assert set(before) - set(after) == gone
  chex.assert_trees_all_equal(after, {path: before[path] for path in after})
  assert {path.rpartition("/")[0] + "/kernel" for path in flat(got["quant"])} == gone


def test_quantise_leaves_the_vision_tower_as_it_is():
  assert re.search(llama.QUANTIZED, "llm/blocks/q/kernel")
  assert not re.search(llama.QUANTIZED, "vision/blocks/q/kernel")


def test_quantise_names_an_unknown_scheme_and_paths_that_match_nothing():
  params = {"q": {"kernel": jnp.ones((64, 2))}}
  with pytest.raises(ValueError, match=r"\['int8', 'nf4', 'nf4_double'\], not 'int4'"):
    quantization.quantize_params(params, "q/", scheme="int4")
  with pytest.raises(ValueError, match=r"no kernel matches 'z/'.*'q/kernel'"):
    quantization.quantize_params(params, "z/", scheme="int8")


@each_scheme
def test_restore_is_the_inverse_of_quantise_but_for_rounding(scheme):
  restored = jax.jit(quantization.restore_quantized)(quantised(PARAMS, scheme))
  assert set(restored) == {"params"}
  # Weights are 0.1 x normal: 4 times that is the largest, 0.16 of it a step by half.
  chex.assert_trees_all_close(restored["params"], PARAMS, atol=0.16 * 0.1 * 5)


@each_scheme
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_dense_equals_a_matmul_with_the_dequantised_kernel(scheme, dtype, rtol):
  layer, x = (
    Dense(6, bias=True, rank=2, alpha=8.0, dtype=dtype),
    jnp.asarray(normal(0, 3, 128)),
  )
  leaves = quantization.SCHEMES[scheme](normal(1, 128, 6))
  a, b, bias = normal(2, 128, 2), normal(3, 2, 6), normal(4, 6)
  variables = {
    "params": {"bias": bias},
    "quant": leaves,
    "lora": {"a": a, "b": b},
  }
  got = layer.apply(variables, x)
  want = x @ (quantization.dequantize(leaves) + 8.0 / 2 * a @ b) + bias
  assert got.dtype == dtype
  assert jnp.linalg.norm(got - want) < rtol * jnp.linalg.norm(want)


@each_scheme
def test_matmul_has_a_gradient_for_its_input_alone(scheme):
  x, leaves = normal(0, 3, 128), quantization.SCHEMES[scheme](normal(1, 128, 6))
  name = "channel_scale" if scheme == "int8" else "block_scale"
  scale = leaves[name].astype(np.float32)
  loss = lambda x, s: jnp.sum(
    jnp.sin(quantization.quantized_matmul(x, {**leaves, name: s}))
  )
  for_x, for_scale = jax.grad(loss, (0, 1))(x, scale)
  kernel = quantization.dequantize(leaves)
  want = jax.grad(lambda x: jnp.sum(jnp.sin(x @ kernel)))(x)
  np.testing.assert_allclose(for_x, want, atol=1e-4)
  assert (for_scale == 0).all()


# All that NF4 does is in nf4_double.
@pytest.mark.parametrize("scheme", ["nf4_double", "int8"])
def test_a_quantised_model_equals_one_with_dequantised_kernels(scheme):
  """Output and gradients of the updates, with layers scanned and recomputed."""
  base = quantised(PARAMS, scheme)
  got, want = (
    value_and_grad(b, LORA)
    for b in (base, jax.jit(quantization.restore_quantized)(base))
  )
  exact = value_and_grad({"params": PARAMS}, LORA)[0]
  assert abs(got[0] - exact) > 1e-4 * abs(exact)  # It is quantised.
  chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", ["nf4_double", "int8"])
def test_a_sharded_quantised_model_equals_an_unsharded_one(scheme):
  base = quantised(PARAMS, scheme)
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  place = lambda tree: jax.device_put(
    tree, sharding.shard_by_rules(tree, llama.SHARDING, mesh)
  )
  got = apply({**place(base), **place({"lora": LORA})}, *INPUTS)
  want = apply({**base, "lora": LORA}, *INPUTS)
  np.testing.assert_allclose(got, want, atol=1e-4)


def through_layers(leaves, x, layer):
  return jax.lax.scan(lambda x, leaves: (layer(x, leaves), None), x, leaves)[0]


@each_scheme
@pytest.mark.parametrize("remat", [False, True])
def test_training_never_holds_all_dequantised_kernels(scheme, remat):
  leaves = jax.jit(quantization.SCHEMES[scheme])(normal(0, 16, 256, 256))
  layer = lambda x, leaves: jnp.tanh(quantization.quantized_matmul(x, leaves))
  layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
  loss = lambda x: jnp.sum(through_layers(leaves, x, layer))
  program = jax.jit(jax.grad(loss)).lower(normal(1, 2, 256)).compile()
  all_kernels = 16 * 256 * 256 * 4
  assert program.memory_analysis().temp_size_in_bytes < all_kernels / 2


@each_scheme
def test_sampling_never_holds_all_dequantised_kernels(scheme):
  leaves = jax.jit(quantization.SCHEMES[scheme])(normal(0, 2, 256, 256))

  def sample(leaves, x):
    def step(x):
      for i in range(2):
        x = jnp.tanh(
          quantization.quantized_matmul(x, jax.tree.map(lambda a, i=i: a[i], leaves))
        )
      return x

    return jax.lax.while_loop(lambda x: x.sum() < 1, step, x)

  program = jax.jit(sample).lower(leaves, normal(1, 2, 256)).compile().as_text()
  (carried,) = re.findall(r"= (.*) while\(", program)
  assert "[2,256]" in carried and "f32[256,256]" not in carried


def test_generate_samples_from_a_quantised_base():
  """The log-probs of what it samples are those of a model that is dequantised."""
  llm = llama.Model(**SHAPE, layers=1)
  model = vlm.VLM(clip.VisionTower(**clip.VARIANTS["tiny"]), Projector(128), llm)
  tokens = jnp.array([[0, 1, -1, 5], [1, -1, -1, 6]])
  video = jnp.asarray(normal(7, 2, 2, 16, 32))
  prompts = text_batch(video, tokens, MASK, MASK & False)
  variables = random_variables(model, prompts)
  base = {
    **quantised(variables["params"], "nf4_double"),
    "lora": variables["lora"],
  }
  settings = dict(max_new=4, temperature=1.0, stops=(-5,), pad=0)
  sample = jax.jit(functools.partial(generate, model, **settings))
  batch, logps = sample(base, prompts, jax.random.key(3))
  logits = jax.jit(model.apply)(jax.jit(quantization.restore_quantized)(base), batch)
  want = jnp.where(batch.loss_mask, token_logps(logits, batch.tokens), 0)
  assert batch.loss_mask.sum() == 2 * 4
  np.testing.assert_allclose(logps, want, atol=1e-4)


def test_four_roles_share_one_quantised_base():
  """All that is alive after each has been used is a base, their updates and results."""
  live = lambda: sum(x.nbytes for x in jax.live_arrays())
  gc.collect()
  before = live()
  base = quantised(PARAMS, "nf4_double")
  roles = {
    name: merge_params(base, {"lora": jax.tree.map(jnp.copy, LORA)})
    for name in ("policy", "ref", "reward", "critic")
  }
  outputs = [apply(role, *INPUTS) for role in roles.values()]
  gc.collect()
  assert live() - before == size(base) + 4 * size(LORA) + size(outputs)


def shapes_of(variant):
  model = llama.Model(**llama.VARIANTS[variant], param_dtype="bfloat16")
  x = jax.ShapeDtypeStruct((2, 4, model.embed), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), x, *INPUTS[1:])["params"]


@pytest.mark.parametrize("variant", ["7b", "13b"])
@pytest.mark.parametrize(
  ("scheme", "most"), [("nf4", 0.56), ("nf4_double", 0.52), ("int8", 1.01)]
)
def test_bytes_of_a_parameter(variant, scheme, most):
  base = jax.eval_shape(
    lambda params: quantization.quantize_params(params, llama.QUANTIZED, scheme=scheme),
    shapes_of(variant),
  )
  count = sum(x.size for x in jax.tree.leaves(kernels_of(base)))
  assert count > {"7b": 6.4e9, "13b": 12.6e9}[variant]
  assert size(base["quant"]) / count < most
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  sharding.shard_by_rules(base, llama.SHARDING, mesh)  # Each leaf has a rule.
