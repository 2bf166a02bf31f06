import json
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests import checkpoints
from tests.checkpoints import IMAGE, inputs, ours, shake, theirs
from vlmrlaif_jax import convert, sharding
from vlmrlaif_jax.models import clip, llama, vlm
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.types import Batch


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
  """A folder with a random LLaVA that has grouped heads, and the model."""
  folder = tmp_path_factory.mktemp("llava")
  model = checkpoints.llava()
  model.save_pretrained(folder)
  return folder, model


@pytest.fixture(scope="module")
def loaded(llava):
  return convert.load_llava(llava[0], dtype="float32")


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
  (tmp_path / "model.safetensors").symlink_to(llava[0] / "model.safetensors")
  with pytest.raises(ValueError, match="rope_type must be 'default', not 'linear'"):
    convert.load_llava(tmp_path)


def test_load_llava_names_an_empty_folder(llava, tmp_path):
  (tmp_path / "config.json").write_text((llava[0] / "config.json").read_text())
  with pytest.raises(FileNotFoundError, match="no model.*safetensors file in"):
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


def test_the_llava_table_names_every_parameter(loaded):
  paths = set(flax.traverse_util.flatten_dict(loaded[1], sep="/"))
  assert paths == set(convert.LLAVA)


def test_round_trip_is_exact(llava, tmp_path):
  for name, source in (("one", llava[0]), ("two", tmp_path / "one")):
    _, params, config = convert.load_llava(source, dtype="float16")
    convert.save_llava(tmp_path / name, params, config, "float16")
  one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
  assert one == two


def test_load_llava_puts_parameters_into_their_shards(llava, loaded):
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  _, params, _ = convert.load_llava(llava[0], dtype="float32", mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, params, loaded[1])
  kernel = params["llm"]["blocks"]["gate"]["kernel"]  # [2, 32, 48]
  assert {s.data.shape for s in kernel.addressable_shards} == {(2, 16, 24)}


def test_tokenizer_of_more_ids_than_the_model_has_is_refused(tiny_checkpoint, tmp_path):
  config = json.loads((tiny_checkpoint / "config.json").read_text())
  config["text_config"]["vocab_size"] = 100
  shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(
    ValueError, match="has ids up to .* vocab_size is 100: it is"
  ):
    convert.load_llava(tmp_path)
