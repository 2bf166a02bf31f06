import functools
import json
import shutil

import flax
import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from tests.helpers import checkpoints
from tests.helpers.checkpoints import IMAGE, ours, theirs
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.huggingface import checkpoint_layouts, convert
from vlmrlaif_jax.models import clip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.ops import quantization
from vlmrlaif_jax.models.projector import Projector


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
  """A folder with a random LLaVA that has grouped heads, and the model."""
  folder = tmp_path_factory.mktemp("llava")
  model = checkpoints.llava()
  model.save_pretrained(folder)
  return folder, model


@pytest.fixture(scope="module")
def loaded(llava):
  return convert.load_checkpoint(llava[0], dtype="float32")


def test_logits_equal_transformers(llava, loaded):
  want = theirs(llava[1])
  assert np.std(want) > 0.3  # Or any tolerance would do.
  np.testing.assert_allclose(ours(*loaded[:2]), want, atol=2e-5)


def test_transformers_loads_what_save_checkpoint_writes(llava, loaded, tmp_path):
  _, variables, config = loaded
  convert.save_checkpoint(tmp_path, variables["params"], config, "float32")
  again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
  np.testing.assert_array_equal(theirs(again.eval()), theirs(llava[1]))


def test_transformers_loads_a_model_that_was_made_here(tmp_path):
  model = vlm.VLM(
    clip.VisionTower(**clip.VARIANTS["tiny"], activation="gelu"),
    Projector(32),
    llama.Model(**llama.VARIANTS["tiny"], rope_base=300.0),
  )
  params = random_params(model)
  config = convert.make_llava_config(model, image_token=IMAGE)
  convert.save_checkpoint(tmp_path, params, config, "float32")
  hf = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
  np.testing.assert_allclose(
    ours(model, {"params": params}), theirs(hf.eval()), atol=2e-5
  )


def random_params(model):
  rng = np.random.default_rng(0)
  random = lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32)
  return jax.tree.map(random, vlm.get_param_shapes(model))


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
def test_load_checkpoint_knows_the_names_of_every_version(
  llava, loaded, tmp_path, names
):
  folder, _ = llava
  tensors = load_file(folder / "model.safetensors")
  tensors = {renamed(names, name): x for name, x in tensors.items()}
  # A buffer that old versions saved, and two files instead of one.
  tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(17)
  order = sorted(tensors)
  for i, part in enumerate((order[::2], order[1::2])):
    save_file({n: tensors[n] for n in part}, tmp_path / f"model-{i}.safetensors")
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  _, variables, _ = convert.load_checkpoint(tmp_path, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, variables, loaded[1])


def test_load_checkpoint_casts_all_but_the_projector(loaded, tmp_path):
  _, variables, config = loaded
  convert.save_checkpoint(tmp_path, variables["params"], config, "bfloat16")
  params = convert.load_checkpoint(tmp_path, dtype="float16")[1]["params"]
  kinds = {k: {x.dtype.name for x in jax.tree.leaves(v)} for k, v in params.items()}
  assert kinds == {"vision": {"float16"}, "llm": {"float16"}, "projector": {"float32"}}


def test_load_checkpoint_refuses_what_our_decoder_does_not_do(llava, tmp_path):
  config = json.loads((llava[0] / "config.json").read_text())
  config["text_config"]["rope_parameters"] = dict(
    rope_type="yarn", factor=2.0, rope_theta=1e4
  )
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "model.safetensors").symlink_to(llava[0] / "model.safetensors")
  with pytest.raises(ValueError, match="rope_type must be one of .*, got 'yarn'"):
    convert.load_checkpoint(tmp_path)


def test_the_llava_table_names_every_parameter(loaded):
  paths = set(flax.traverse_util.flatten_dict(loaded[1]["params"], sep="/"))
  assert paths == set(checkpoint_layouts.make_llava_table("llama", "clip_vision_model"))


def test_round_trip_is_exact(llava, tmp_path):
  for name, source in (("one", llava[0]), ("two", tmp_path / "one")):
    _, variables, config = convert.load_checkpoint(source, dtype="float16")
    convert.save_checkpoint(tmp_path / name, variables["params"], config, "float16")
  one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
  assert one == two


def test_load_checkpoint_puts_parameters_into_their_shards(llava, loaded):
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  _, variables, _ = convert.load_checkpoint(llava[0], dtype="float32", mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, variables, loaded[1])
  kernel = variables["params"]["llm"]["blocks"]["gate"]["kernel"]  # [2, 32, 48]
  assert {s.data.shape for s in kernel.addressable_shards} == {(2, 16, 24)}


def test_tokenizer_of_more_ids_than_the_model_has_is_refused(tiny_checkpoint, tmp_path):
  config = json.loads((tiny_checkpoint / "config.json").read_text())
  config["text_config"]["vocab_size"] = 100
  shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="has ids up to .* vocab_size is 100"):
    convert.load_checkpoint(tmp_path)


# Other families.


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
  """A folder with a LLaVA of a tied Qwen2 and a SigLIP, and the model."""
  folder = tmp_path_factory.mktemp("qwen")
  model = checkpoints.llava("qwen2", "siglip")
  model.save_pretrained(folder)
  return folder, model


def test_qwen2_with_a_siglip_has_the_logits_of_transformers(qwen):
  lines, want = [], theirs(qwen[1])
  found = convert.load_checkpoint(qwen[0], dtype="float32", note=lines.append)
  assert "lm_head" not in found[1]["params"]["llm"] and found[0].llm.tied
  assert "image pooling head (11 vision_model.head)" in lines[0]
  assert np.std(want) > 0.3  # Or any tolerance would do.
  np.testing.assert_allclose(ours(*found[:2]), want, atol=2e-5)


def test_transformers_loads_a_saved_qwen2_with_a_siglip(qwen, tmp_path):
  _model, variables, config = convert.load_checkpoint(qwen[0], dtype="float32")
  convert.save_checkpoint(tmp_path, variables["params"], config, "float32")
  again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
  np.testing.assert_array_equal(theirs(again.eval()), theirs(qwen[1]))


def test_config_made_of_a_qwen2_with_a_siglip_is_read_back(qwen, tmp_path):
  model, variables, _ = convert.load_checkpoint(qwen[0], dtype="float32")
  config = convert.make_llava_config(model, image_token=IMAGE)
  convert.save_checkpoint(tmp_path, variables["params"], config, "float32")
  again, found, _ = convert.load_checkpoint(tmp_path, dtype="float32")
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_output_matrix_beside_a_tied_config_is_used(qwen, tmp_path):
  shutil.copytree(qwen[0], tmp_path, dirs_exist_ok=True)
  tensors = load_file(tmp_path / "model.safetensors")
  tensors["language_model.lm_head.weight"] = np.ones((64, 32), np.float32)
  save_file(tensors, tmp_path / "model.safetensors")
  model, variables, _ = convert.load_checkpoint(tmp_path, dtype="float32")
  assert not model.llm.tied
  assert (variables["params"]["llm"]["lm_head"]["kernel"] == 1).all()


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"vision_feature_select_strategy": "default"}, "must be 'full', got 'default'"),
    ({"text_config": {"model_type": "gemma"}}, "text_config.* one of .* got 'gemma'"),
  ],
)
def test_what_a_family_does_not_do_is_refused(qwen, tmp_path, wrong, message):
  config = json.loads((qwen[0] / "config.json").read_text()) | wrong
  (tmp_path / "config.json").write_text(json.dumps(config))
  (tmp_path / "model.safetensors").symlink_to(qwen[0] / "model.safetensors")
  with pytest.raises(ValueError, match=message):
    convert.load_checkpoint(tmp_path)


# Attention and quantisation.


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
  """A folder whose kernels are wide enough for blocks of NF4 in two shards."""
  llm = llama.Model(vocab=64, embed=128, mlp=128, layers=2, heads=4, kv_heads=4)
  model = vlm.VLM(clip.VisionTower(**clip.VARIANTS["tiny"]), Projector(128), llm)
  folder = tmp_path_factory.mktemp("wide")
  config = convert.make_llava_config(model, image_token=IMAGE)
  convert.save_checkpoint(folder, random_params(model), config)
  return folder


@pytest.mark.parametrize("scheme", sorted(quantization.SCHEMES))
def test_quantised_while_loaded_is_quantised_after_it(wide, scheme):
  _, whole, _ = convert.load_checkpoint(wide, dtype="bfloat16")
  want = quantization.quantize_params(whole["params"], llama.QUANTIZED, scheme=scheme)
  _, got, _ = convert.load_checkpoint(wide, dtype="bfloat16", quant=scheme)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("scheme", sorted(quantization.SCHEMES))
def test_quantised_into_shards_is_quantised_on_the_devices(wide, scheme):
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  _, whole, _ = convert.load_checkpoint(wide, dtype="bfloat16")
  _, got, _ = convert.load_checkpoint(wide, dtype="bfloat16", quant=scheme, mesh=mesh)
  # Compiled, division by a constant rounds otherwise than NumPy's.
  quantise = functools.partial(
    quantization.quantize_params, paths=llama.QUANTIZED, scheme=scheme
  )
  jax.tree.map(np.testing.assert_array_equal, got, jax.jit(quantise)(whole["params"]))
  places = sharding.shard_by_rules(got, vlm.SHARDING, mesh)
  same = lambda x, place: x.sharding.is_equivalent_to(place, x.ndim)
  assert all(jax.tree.leaves(jax.tree.map(same, got, places)))


def test_unknown_quantisation_is_refused(wide):
  with pytest.raises(ValueError, match='quant must be "none" or one of .*, got .int4'):
    convert.load_checkpoint(wide, quant="int4")
