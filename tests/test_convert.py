import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from vlmrlaif_jax import convert
from vlmrlaif_jax.models import clip, llama, vlm
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.types import VIDEO_TOKEN, Batch

IMAGE, PATCHES = 63, 16  # The id that stands for an image, and how many it takes.


def shake(model):
  """Random weights that are far from what any initialiser makes."""
  torch.manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.15 * torch.randn_like(p))
  return model.eval()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
  """A folder with a random LLaVA that has grouped heads, and the model."""
  config = transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(
      hidden_size=32,
      intermediate_size=64,
      num_hidden_layers=3,
      num_attention_heads=4,
      image_size=16,
      patch_size=4,
    ),
    text_config=transformers.LlamaConfig(
      vocab_size=64,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      rms_norm_eps=1e-4,
      rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    image_token_index=IMAGE,
    image_seq_length=PATCHES,
  )
  folder = tmp_path_factory.mktemp("llava")
  model = shake(transformers.LlavaForConditionalGeneration(config))
  model.save_pretrained(folder)
  return folder, model


@pytest.fixture(scope="module")
def loaded(llava):
  return convert.load_llava(llava[0], dtype="float32")


def inputs():
  """Two images with questions of unequal length, padded on the left."""
  rng = np.random.default_rng(0)
  tokens, mask = np.zeros((2, 24), int), np.zeros((2, 24), bool)
  for i, length in enumerate((7, 4)):
    row = [1, *[IMAGE] * PATCHES, *rng.integers(3, 60, length)]
    tokens[i, -len(row) :], mask[i, -len(row) :] = row, True
  return rng.normal(size=(2, 16, 16, 3)).astype(np.float32), tokens, mask


def theirs(model):
  pixels, tokens, mask = inputs()
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(tokens),
      pixel_values=torch.tensor(np.moveaxis(pixels, -1, 1)),
      attention_mask=torch.tensor(mask).long(),
      position_ids=torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0)),
    ).logits.numpy()[mask]


def ours(model, params):
  pixels, tokens, mask = inputs()
  tokens = np.where(tokens == IMAGE, VIDEO_TOKEN, tokens)
  batch = Batch(pixels[:, None], tokens, mask, mask)
  return np.asarray(jax.jit(model.apply)({"params": params}, batch))[mask]


def test_logits_equal_transformers(llava, loaded):
  want = theirs(llava[1])
  assert np.std(want) > 0.3  # Or any tolerance would do.
  np.testing.assert_allclose(ours(*loaded[:2]), want, atol=2e-5)


def test_transformers_loads_what_save_llava_writes(llava, loaded, tmp_path):
  _, params, config = loaded
  convert.save_llava(tmp_path, params, config, "float32")
  again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
  np.testing.assert_array_equal(theirs(again.eval()), theirs(llava[1]))


def test_transformers_loads_a_model_that_was_made_here(tmp_path):
  model = vlm.VLM(
    clip.VisionTower(**clip.VARIANTS["tiny"], activation="gelu"),
    Projector(32),
    llama.Model(**llama.VARIANTS["tiny"], rope_base=300.0),
  )
  pixels, tokens, mask = (jnp.asarray(x) for x in inputs())
  batch = Batch(pixels[:, None], tokens, mask, mask)
  params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
  config = convert.llava_config(model, image_token=IMAGE)
  convert.save_llava(tmp_path, params, config, "float32")
  hf = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
  np.testing.assert_allclose(ours(model, params), theirs(hf.eval()), atol=2e-5)


# How transformers named the tensors: on disk up to version 4.51, in memory from 4.52.
OLD = {"vision_tower.": "vision_tower.vision_model."}
NEW = {
  "language_model.lm_head.": "lm_head.",
  "language_model.model.": "model.language_model.",
  "vision_tower.": "model.vision_tower.",
  "multi_modal_projector.": "model.multi_modal_projector.",
}


def renamed(names, name):
  for start, other in names.items():
    if name.startswith(start):
      return other + name.removeprefix(start)
  return name


@pytest.mark.parametrize("names", [OLD, NEW], ids=["old", "new"])
def test_load_llava_knows_the_names_of_every_version(llava, loaded, tmp_path, names):
  folder, _ = llava
  tensors = load_file(folder / "model.safetensors")
  tensors = {renamed(names, name): x for name, x in tensors.items()}
  # A buffer that old versions saved, and two files instead of one.
  tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(17)
  order = sorted(tensors)
  for i, part in enumerate((order[::2], order[1::2])):
    save_file({n: tensors[n] for n in part}, tmp_path / f"model-{i}.safetensors")
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  _, params, _ = convert.load_llava(tmp_path, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, params, loaded[1])


def test_load_llava_casts_all_but_the_projector(llava, tmp_path):
  _, params, config = convert.load_llava(llava[0], dtype="float32")
  convert.save_llava(tmp_path, params, config, "bfloat16")
  _, params, _ = convert.load_llava(tmp_path, dtype="float16")
  kinds = {k: {x.dtype.name for x in jax.tree.leaves(v)} for k, v in params.items()}
  assert kinds == {"vision": {"float16"}, "llm": {"float16"}, "projector": {"float32"}}


def test_load_llava_refuses_what_our_decoder_does_not_do(llava, tmp_path):
  config = json.loads((llava[0] / "config.json").read_text())
  config["text_config"]["rope_parameters"] = dict(
    rope_type="linear", factor=2.0, rope_theta=1e4
  )
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="rope_type must be 'default', not 'linear'"):
    convert.load_llava(tmp_path)


def test_load_llava_names_an_empty_folder(llava, tmp_path):
  (tmp_path / "config.json").write_text((llava[0] / "config.json").read_text())
  with pytest.raises(FileNotFoundError, match="no .*safetensors file in"):
    convert.load_llava(tmp_path)


def test_transformers_loads_what_save_clip_writes(tmp_path):
  side = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
  config = transformers.CLIPConfig(
    text_config=dict(
      **side,
      num_hidden_layers=2,
      vocab_size=50,
      max_position_embeddings=8,
      bos_token_id=1,
      eos_token_id=49,
    ),
    vision_config=dict(**side, num_hidden_layers=3, image_size=8, patch_size=4),
    projection_dim=12,
  )
  hf = shake(transformers.CLIPModel(config))
  hf.save_pretrained(tmp_path / "theirs")
  model, params, config = convert.load_clip(tmp_path / "theirs")
  assert (model.features, model.text.context, model.vision.layers) == (12, 8, 3)
  convert.save_clip(tmp_path / "ours", params, config)
  again = transformers.CLIPModel.from_pretrained(tmp_path / "ours")
  for name, tensor in hf.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name


TABLE = {
  "a/kernel": ("layers.{}.weight", "T"),
  "patch": ("conv.weight", "conv"),
  "scale": ("scale", ""),
}
TENSORS = {
  "layers.0.weight": np.arange(6.0).reshape(2, 3),
  "layers.1.weight": np.arange(6.0, 12.0).reshape(2, 3),
  "conv.weight": np.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2),
  "scale": np.array(7.0),
}
SHAPES = {
  "a": {"kernel": jax.ShapeDtypeStruct((2, 3, 2), np.float32)},
  "patch": jax.ShapeDtypeStruct((12, 2), np.float32),
  "scale": jax.ShapeDtypeStruct((), np.float32),
}


def test_from_hf_stacks_transposes_and_flattens():
  params = convert.from_hf(TABLE, TENSORS, SHAPES)
  np.testing.assert_array_equal(params["a"]["kernel"][1], [[6, 9], [7, 10], [8, 11]])
  # Height, then width, then colour; of the first filter.
  want = [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
  np.testing.assert_array_equal(params["patch"][:, 0], want)


def test_to_hf_is_the_inverse_of_from_hf():
  tensors = convert.to_hf(TABLE, convert.from_hf(TABLE, TENSORS, SHAPES))
  assert set(tensors) == set(TENSORS)
  for name, x in TENSORS.items():
    np.testing.assert_array_equal(tensors[name], x)


def test_from_hf_names_what_is_missing_and_what_is_unused():
  tensors = {**TENSORS, "stray": np.zeros(2)}
  del tensors["layers.1.weight"]
  with pytest.raises(ValueError, match=r"missing.*layers\.1\.weight.*no use.*stray"):
    convert.from_hf(TABLE, tensors, SHAPES)


def test_from_hf_names_a_wrong_shape():
  tensors = {**TENSORS, "scale": np.zeros(2)}
  with pytest.raises(ValueError, match=r"scale must have shape \(\); scale has \(2,\)"):
    convert.from_hf(TABLE, tensors, SHAPES)


def test_parameters_that_the_table_does_not_know_are_refused():
  with pytest.raises(ValueError, match=r"without a name.*\['head/bias'\]"):
    convert.from_hf(TABLE, TENSORS, {**SHAPES, "head": {"bias": SHAPES["scale"]}})
  with pytest.raises(ValueError, match=r"without a name.*\['head/bias'\]"):
    convert.to_hf(TABLE, {"head": {"bias": np.zeros(1)}})


def test_the_llava_table_names_every_parameter(loaded):
  paths = set(flax.traverse_util.flatten_dict(loaded[1], sep="/"))
  assert paths == set(convert.LLAVA)
