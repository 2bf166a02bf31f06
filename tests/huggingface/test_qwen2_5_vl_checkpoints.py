"""Folders of Qwen2.5-VL: as transformers writes them, and as they are published."""

import shutil

import flax
import jax
import numpy as np
import pytest
import torch
import transformers

from tests.helpers import qwen, qwen2_5
from tests.huggingface.test_qwen3_vl_checkpoints import change
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.data.processors.qwen2_5_vl import Qwen25VLProcessor
from vlmrlaif_jax.huggingface import convert, families, param_mapping
from vlmrlaif_jax.models import layers, qwen2_5_vl, vlm
from vlmrlaif_jax.models.decoders import qwen2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(the model of transformers, layout -> folder)."""
  root = tmp_path_factory.mktemp("qwen2_5")
  hf = qwen2_5.write_checkpoint(root / "new")
  qwen2_5.write_published(root / "published", root / "new")
  return hf, {name: root / name for name in ("new", "published")}


@pytest.fixture
def copy(made, tmp_path):
  return shutil.copytree(made[1]["published"], tmp_path / "copy")


@pytest.mark.parametrize("layout", ["new", "published"])
def test_parameters_are_those_of_transformers(made, layout):
  hf, folders = made
  notes = []
  model, variables, config = convert.load_checkpoint(
    folders[layout], dtype="float32", note=notes.append
  )
  want = qwen2_5.convert_tensors(model, hf)
  jax.tree.map(np.testing.assert_array_equal, variables, want)
  assert model == qwen2_5.pair()[1].clone(llm=model.llm)
  assert model.llm.mrope == tuple(qwen2_5.SECTIONS) and not model.llm.mrope_interleaved
  assert not model.llm.tied and model.llm.rope_base == 1e6
  assert config["vision_config"]["tokens_per_second"] == 2
  unused = "vision_config.in_chans, vision_config.spatial_patch_size"
  assert (unused in notes[0]) == (layout == "published")


@pytest.mark.parametrize("layout", ["new", "published"])
def test_settings_of_the_processor_are_read(made, layout):
  folder = made[1][layout]
  config, _ = families.read_family_config(folder)
  got = families.read_processor(folder, config)
  sides = dict(min_pixels=256, max_pixels=1024)
  images = dict(min_image_pixels=256, max_image_pixels=1024)
  half = (0.5, 0.5, 0.5)
  colors = dict(mean=half, std=half, image_mean=half, image_std=half)
  assert got == Qwen25VLProcessor(patch=4, **sides, **images, **colors)


def test_what_is_written_is_what_transformers_reads(made, tmp_path):
  hf, folders = made
  _, variables, config = convert.load_checkpoint(folders["published"], dtype="float32")
  convert.save_checkpoint(tmp_path, variables["params"], config, dtype="float32")
  again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
  want = hf.state_dict()
  assert again.state_dict().keys() == want.keys()
  for name, tensor in again.state_dict().items():
    assert torch.equal(tensor, want[name]), name
  text, wanted = again.config.text_config, hf.config.text_config
  # transformers also keeps "type", by its old name.
  assert {**text.rope_parameters, **wanted.rope_parameters} == text.rope_parameters
  # The published config has two keys more, and the dtype is that of the files.
  vision, wanted = (x.config.vision_config.to_dict() for x in (again, hf))
  assert vision == {**vision, **wanted, "dtype": "float32"}


@pytest.mark.parametrize(
  "values, reason",
  [
    (dict(hidden_act="gelu"), "text_config.hidden_act must be 'silu'"),
    (dict(use_sliding_window=True), "text_config.use_sliding_window must be False"),
    (dict(rope_scaling__mrope_section=[4, 2, 1]), "mrope_section"),
    (dict(vision_config__temporal_patch_size=1), "temporal_patch_size must be 2"),
    (dict(vision_config__hidden_act="gelu"), "vision_config.hidden_act must be 'silu'"),
    (dict(vision_config__out_hidden_size=16), "out_hidden_size=16 must be"),
    (dict(vision_config__window_size=20), "window_size must be a multiple of 8"),
    (dict(num_experts=8), "num_experts=8 is not supported"),
  ],
)
def test_unsupported_values_are_refused_by_name(copy, values, reason):
  change(copy / "config.json", **values)
  with pytest.raises(ValueError, match=reason):
    convert.load_checkpoint(copy)


def test_settings_of_the_processor_that_differ_are_all_named(copy):
  file = copy / "preprocessor_config.json"
  change(file, temporal_patch_size=4, do_normalize=False, crop_size=8)
  config, _ = families.read_family_config(copy)
  named = "temporal_patch_size of .*do_normalize of .*crop_size=8 of "
  with pytest.raises(ValueError, match=named):
    families.read_processor(copy, config)


# Published sizes.

# hidden_size, layers, heads, key and value heads, MLP; then whether the embeddings are
# tied, and the MLP of the tower.
PUBLISHED = {
  "3b": (2048, 36, 16, 2, 11_008, True, 3420),
  "7b": (3584, 28, 28, 4, 18_944, False, 3420),
  "32b": (5120, 64, 40, 8, 27_648, False, 3456),
  "72b": (8192, 80, 64, 8, 29_568, False, 3456),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_tensors_of_published_sizes_are_those_of_transformers(size):
  embed, depth, heads, kv_heads, mlp, tied, tower_mlp = PUBLISHED[size]
  config = transformers.Qwen2_5_VLConfig(
    hidden_size=embed, num_hidden_layers=depth, num_attention_heads=heads,
    num_key_value_heads=kv_heads, intermediate_size=mlp, rms_norm_eps=1e-6,
    vocab_size=151_936 if tied else 152_064, tie_word_embeddings=tied,
    rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    vision_config=dict(
      hidden_size=1280, intermediate_size=tower_mlp, out_hidden_size=embed,
      tokens_per_second=2,
    ),
  )  # fmt: skip
  with torch.device("meta"):
    hf = transformers.Qwen2_5_VLForConditionalGeneration(config)
  want = {name: tuple(x.shape) for name, x in hf.state_dict().items()}
  if tied:
    del want["lm_head.weight"]
  model = convert.make_model(qwen.full_config(hf), "bfloat16")
  shapes = vlm.get_param_shapes(model)
  table = {
    path: source
    for path, source in qwen2_5_vl.HF.items()
    if not (tied and path == "llm/lm_head/kernel")
  }
  assert set(flax.traverse_util.flatten_dict(shapes, sep="/")) == set(table)
  assert param_mapping.get_hf_shapes(table, shapes) == want
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  sharding.shard_by_rules({"params": shapes}, families.SHARDING, mesh)
  variant = qwen2.Model(**qwen2_5_vl.LLM_VARIANTS[size])
  names = qwen2.CONFIG
  assert layers.write_fields(names, model.llm) == layers.write_fields(names, variant)
  tower = qwen2_5_vl.Model(**qwen2_5_vl.VARIANTS[size])
  own = layers.write_fields(qwen2_5_vl.CONFIG, model.vision)
  assert own == layers.write_fields(qwen2_5_vl.CONFIG, tower)
