"""Folders of Qwen3-VL: what loads, what is written, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.helpers import qwen
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.data.processors.qwen3_vl import Qwen3VLProcessor
from vlmrlaif_jax.huggingface import convert, families
from vlmrlaif_jax.models import projector, qwen3_vl, vlm
from vlmrlaif_jax.models.decoders import qwen3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("qwen")
  return qwen.write_checkpoint(folder), folder


@pytest.fixture
def copy(made, tmp_path):
  return shutil.copytree(made[1], tmp_path / "copy")


def change(file, **values):
  """Changes keys of a JSON file; "__" stands between levels."""
  config = json.loads(file.read_text())
  for key, value in values.items():
    *outer, name = key.split("__")
    place = config
    for level in outer:
      place = place[level]
    place[name] = value
  file.write_text(json.dumps(config))


def test_parameters_are_those_of_transformers(made):
  hf, folder = made
  model, variables, _ = convert.load_checkpoint(folder, dtype="float32")
  want = qwen.convert(model, hf)
  jax.tree.map(np.testing.assert_array_equal, variables, want)
  assert model.llm.mrope == qwen.SECTIONS and model.llm.tied


def test_a_mesh_has_the_same_parameters(made):
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  _, spread, _ = convert.load_checkpoint(made[1], dtype="float32", mesh=mesh)
  _, want, _ = convert.load_checkpoint(made[1], dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(spread), want)


def test_what_is_written_is_what_transformers_reads(made, tmp_path):
  hf, folder = made
  _, variables, config = convert.load_checkpoint(folder, dtype="float32")
  convert.save_checkpoint(tmp_path, variables["params"], config, dtype="float32")
  again = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
  want = hf.state_dict()
  assert again.state_dict().keys() == want.keys()
  for name, tensor in again.state_dict().items():
    assert torch.equal(tensor, want[name]), name
  assert (
    again.config.text_config.rope_parameters == hf.config.text_config.rope_parameters
  )


def test_settings_of_the_processor_are_read(made):
  got = families.read_processor(made[1], {"model_type": "qwen3_vl"})
  sides = dict(min_pixels=256, max_pixels=8192)
  images = dict(min_image_pixels=256, max_image_pixels=8192)
  assert got == Qwen3VLProcessor(patch=4, **sides, **images)


@pytest.mark.parametrize(
  "values, reason",
  [
    (dict(text_config__hidden_act="gelu"), "text_config.hidden_act must be 'silu'"),
    (dict(text_config__attention_bias=True), "attention_bias must be False"),
    (dict(vision_config__temporal_patch_size=1), "temporal_patch_size must be 2"),
    (
      dict(vision_config__hidden_act="swish"),
      "vision_config.hidden_act must be one of",
    ),
    (dict(vision_config__out_hidden_size=16), "out_hidden_size=16 must be"),
    (dict(text_config__rope_parameters__mrope_section=[4, 2, 1]), "mrope_section"),
    (dict(text_config__num_experts=8), "num_experts=8 is not supported"),
  ],
)
def test_unsupported_values_are_refused_by_name(copy, values, reason):
  change(copy / "config.json", **values)
  with pytest.raises(ValueError, match=reason):
    convert.load_checkpoint(copy)


def test_unsupported_settings_of_the_processor_are_refused_by_name(copy):
  change(copy / "video_preprocessor_config.json", temporal_patch_size=4)
  with pytest.raises(ValueError, match="temporal_patch_size"):
    families.read_processor(copy, {"model_type": "qwen3_vl"})


@pytest.mark.parametrize("size", qwen3_vl.LLM_VARIANTS)
def test_parameters_of_published_sizes_have_names_and_shardings(size):
  tower = qwen3_vl.Model(**qwen3_vl.VARIANTS[size])
  llm = qwen3.Model(
    **qwen3_vl.LLM_VARIANTS[size], mrope=qwen3_vl.ROPE_SECTIONS, mrope_interleaved=True
  )
  model = vlm.VLM(tower, projector.Connector(llm.embed), llm)
  shapes = vlm.get_param_shapes(model)
  names = {"/".join(k.key for k in path) for path, _ in
           jax.tree_util.tree_leaves_with_path(shapes)}  # fmt: skip
  assert names <= set(qwen3_vl.HF)
  sharding.shard_by_rules(
    {"params": shapes}, families.SHARDING, sharding.make_mesh(fsdp=2, tensor=2)
  )
