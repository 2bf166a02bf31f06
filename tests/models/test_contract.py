"""What every model family keeps to; a new file in models/ is tested by being there."""

import functools
import importlib
import pathlib
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.helpers.rows import text_positions
from vlmrlaif_jax import models
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.huggingface.convert import convert_from_hf
from vlmrlaif_jax.models import lora

THEIRS = {  # Family -> the class of transformers that it is to equal.
  "llama": transformers.LlamaForCausalLM,
  "mistral": transformers.MistralForCausalLM,
  "qwen2": transformers.Qwen2ForCausalLM,
  "qwen3": transformers.Qwen3ForCausalLM,
  "clip": transformers.CLIPVisionModel,
  "siglip": transformers.SiglipVisionModel,
}
# Towers of patches in a grid, whose tests are in a file of their own.
WITH_GRID = {"llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"}
HOME = pathlib.Path(models.__file__).parent
FILES = sorted([*HOME.glob("*.py"), *HOME.glob("decoders/*.py")])
MODULES = {
  path.stem: importlib.import_module(
    ".".join(("vlmrlaif_jax.models", *path.relative_to(HOME).with_suffix("").parts))
  )
  for path in FILES
  if re.search(r"^VARIANTS\b", path.read_text(), re.MULTILINE)
  and path.stem not in WITH_GRID
}
ALL = [(family, v) for family, module in MODULES.items() for v in module.VARIANTS]
DECODERS = [family for family, module in MODULES.items() if "vocab" in module.CONFIG]
TOWERS = [family for family in MODULES if family not in DECODERS]

normal = lambda *shape: np.random.default_rng(0).normal(size=shape).astype(np.float32)

TOKENS = np.random.default_rng(0).integers(0, 64, (3, 9))
MASK = np.ones((3, 9), bool)
MASK[1, :4], MASK[2, 6:] = False, False  # Padded on the left, and on the right.


def build(family, variant="tiny"):
  lora = dict(rank=4, alpha=6.0) if family in DECODERS else {}
  return MODULES[family].Model(**MODULES[family].VARIANTS[variant], **lora)


def table(family):
  """Where each parameter of Model comes from."""
  module = vars(MODULES[family])
  return module["HF_VISION"] if "HF_VISION" in module else module["HF"]


def hidden(model, tokens, mask):
  return model(model.embed_tokens(tokens), text_positions(mask), mask)


def logits(model, tokens, mask):
  return model.logits(hidden(model, tokens, mask))


def init(model):
  """Every variable of a decoder or a tower, from a key."""
  if "vocab" in vars(model):
    ones = jnp.ones((1, 4), int)
    return lambda key: model.init(key, ones, ones > 0, method=logits)
  return lambda key: model.init(key, jnp.zeros((1, model.image, model.image, 3)))


@functools.cache
def shapes_of(family, variant="tiny"):
  """Of every variable, LoRA's included; nothing is computed."""
  return jax.eval_shape(init(build(family, variant)), jax.random.key(0))


def their_config(family, model):
  """Our fields under their names; dots stand between the levels of theirs."""
  config = {}
  for ours, theirs in MODULES[family].CONFIG.items():
    *outer, name = theirs.split(".")
    place = config
    for level in outer:
      place = place.setdefault(level, {"rope_type": "default"})
    place[name] = getattr(model, ours)
  return THEIRS[family].config_class(**config)


@functools.cache
def theirs(family):
  """A random model of transformers, as small as our "tiny"."""
  torch.manual_seed(0)
  hf = THEIRS[family](their_config(family, build(family))).eval()
  with torch.no_grad():
    for p in hf.parameters():
      p.add_(0.15 * torch.randn_like(p))
  return hf


@functools.cache
def variables_of(family):
  """Its weights as our variables; updates as if trained, if it is a decoder."""
  tensors = {name: x.numpy() for name, x in theirs(family).state_dict().items()}
  for name in list(tensors):  # What published checkpoints lack, or what ours leaves.
    tied = family in DECODERS and build(family).tied
    if name.startswith("head.") or (name == "lm_head.weight" and tied):
      del tensors[name]
  shapes = shapes_of(family)
  params = convert_from_hf(table(family), tensors, shapes["params"])
  trained = jax.tree.map(lambda x: 0.1 * normal(*x.shape), shapes)
  return {**trained, "params": params}


@functools.cache
def jitted(family, method):
  return jax.jit(functools.partial(build(family).apply, method=method))


def run(family, variables, method, *inputs):
  return jitted(family, method)(variables, *map(jnp.asarray, inputs))


def base(family):
  """Its variables without the updates."""
  return {"params": variables_of(family)["params"]}


def test_each_family_is_compared_with_transformers():
  assert set(MODULES) == set(THEIRS)


@pytest.mark.parametrize("family, variant", ALL)
def test_every_parameter_has_a_sharding_rule(family, variant):
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  sharding.shard_by_rules(shapes_of(family, variant), MODULES[family].SHARDING, mesh)


@pytest.mark.parametrize("family, variant", ALL)
def test_the_parameters_are_those_with_a_name_in_hugging_face(family, variant):
  params = shapes_of(family, variant)["params"]
  names = set(table(family))
  if MODULES[family].VARIANTS[variant].get("tied"):
    names.remove("lm_head/kernel")
  assert set(flax.traverse_util.flatten_dict(params, sep="/")) == names


PUBLISHED = {  # How many parameters the checkpoints on Hugging Face say they have.
  ("llama", "7b"): 6_738_415_616,
  ("llama", "13b"): 13_015_864_320,
  ("mistral", "7b"): 7_241_732_096,
  ("mistral", "7b_v3"): 7_248_023_552,
  ("qwen2", "0.5b"): 494_032_768,
  ("qwen2", "1.5b"): 1_543_714_304,
  ("qwen2", "3b"): 3_085_938_688,
  ("qwen2", "7b"): 7_615_616_512,
  ("qwen2", "14b"): 14_770_033_664,
  ("qwen2", "32b"): 32_763_876_352,
  ("qwen2", "72b"): 72_706_203_648,
  ("qwen3", "0.6b"): 596_049_920,
  ("qwen3", "1.7b"): 1_720_574_976,
  ("qwen3", "4b"): 4_022_468_096,
  ("qwen3", "8b"): 8_190_735_360,
  ("qwen3", "14b"): 14_768_307_200,
  ("qwen3", "32b"): 32_762_123_264,
}


@pytest.mark.parametrize("family, variant", PUBLISHED)
def test_a_decoder_has_as_many_parameters_as_published(family, variant):
  params = shapes_of(family, variant)["params"]
  assert lora.count_params(params) == PUBLISHED[family, variant]


@pytest.mark.parametrize("family", DECODERS)
def test_logits_equal_transformers(family):
  with torch.no_grad():
    want = theirs(family)(
      torch.tensor(TOKENS),
      attention_mask=torch.tensor(MASK).long(),
      position_ids=torch.tensor(np.maximum(np.cumsum(MASK, 1) - 1, 0)),
    ).logits.numpy()
  got = run(family, base(family), logits, TOKENS, MASK)
  assert np.std(want) > 0.3  # Or any tolerance would do.
  np.testing.assert_allclose(got[MASK], want[MASK], atol=2e-5)


@pytest.mark.parametrize("family", TOWERS)
def test_patches_equal_a_hidden_state_of_transformers(family):
  model = build(family)
  pixels = normal(2, model.image, model.image, 3)
  with torch.no_grad():
    states = theirs(family)(
      torch.tensor(np.moveaxis(pixels, -1, 1)), output_hidden_states=True
    ).hidden_states
  want = states[model.select_layer].numpy()
  got = run(family, base(family), "patches", pixels)
  assert np.std(want) > 0.3
  np.testing.assert_allclose(got, want[:, -got.shape[1] :], atol=2e-5)


@pytest.mark.parametrize("select_layer, layers", [(-1, 3), (-2, 2), (-4, 0), (1, 1)])
@pytest.mark.parametrize("family", TOWERS)
def test_patches_run_no_layer_after_the_selected_one(family, select_layer, layers):
  model = build(family).clone(select_layer=select_layer)
  assert model.selected == layers
  params = base(family)["params"]
  hide = lambda x: jnp.asarray(x).at[layers:].set(jnp.nan)
  blocks = jax.tree.map(hide, params["blocks"])
  pixels = jnp.asarray(normal(2, model.image, model.image, 3))
  apply = jax.jit(functools.partial(model.apply, method="patches"))
  assert np.isfinite(apply({"params": {**params, "blocks": blocks}}, pixels)).all()


@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_normalises_pixels_to_about_one(family):
  frames = jnp.zeros((2, 1, 1, 3), jnp.uint8).at[1].set(255)
  low, high = build(family).normalize(frames)
  assert np.all((low > -2) & (low < -0.9)) and np.all((high > 0.9) & (high < 2.5))


@pytest.mark.parametrize("family", DECODERS)
def test_cached_decoding_equals_the_full_forward(family):
  variables, cut = variables_of(family), 7
  tokens, mask = jnp.asarray(TOKENS[:2]), jnp.asarray(MASK[:2])
  positions = text_positions(mask)

  def stepwise(model):
    x = model.embed_tokens(tokens)
    read = (part[:, :cut] for part in (x, positions, mask))
    hidden, caches = model.prefill(*read, 9)
    states = [hidden]
    for t in range(cut, 9):
      seen = (mask & (jnp.arange(9) <= t))[:, None]
      new = (part[:, t : t + 1] for part in (x, positions))
      hidden, caches = model.decode(*new, seen, caches, t)
      states.append(hidden)
    return model.logits(jnp.concatenate(states, axis=1))

  got = run(family, variables, stepwise)
  want = run(family, variables, logits, TOKENS, MASK)[:2]
  np.testing.assert_allclose(got[mask], want[mask], atol=2e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_lora_is_the_identity_at_init(family):
  start = jax.jit(init(build(family)))(jax.random.key(0))["lora"]
  got = run(family, {**base(family), "lora": start}, logits, TOKENS, MASK)
  want = run(family, base(family), logits, TOKENS, MASK)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("family", DECODERS)
def test_merged_lora_equals_lora_beside_its_base(family):
  variables = variables_of(family)
  merged = lora.merge_lora(variables, build(family).alpha)
  got, want, without = (
    run(family, v, logits, TOKENS, MASK) for v in (merged, variables, base(family))
  )
  assert np.abs(want - without).max() > 0.1
  np.testing.assert_allclose(got[MASK], want[MASK], atol=2e-5)
