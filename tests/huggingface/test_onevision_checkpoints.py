"""Folders of LLaVA-OneVision and LLaVA-Video: what loads, and what is refused."""

import json

import jax
import numpy as np
import pytest

from tests.helpers import onevision
from vlmrlaif_jax.data.processors.llava_onevision import LlavaOnevisionProcessor
from vlmrlaif_jax.huggingface import convert, families


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("onevision")
  (root / "hf").mkdir()
  hf = onevision.write_checkpoint(root / "hf")
  video = dict(
    mm_newline_position="grid",
    mm_spatial_pool_mode="average",
    add_time_instruction=True,
  )
  onevision.write_original(root / "original", hf, frames_upbound=64, **video)
  return hf, root


def test_parameters_and_processor_are_those_of_transformers(root):
  hf, folder = root
  model, variables, config = convert.load_checkpoint(folder / "hf", dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, variables, onevision.convert(model, hf))
  assert model.llm.tied and model.vision.newline == "one_token"
  got = convert.load_processor(folder / "hf", config, model, frames=8)
  assert got == onevision.PROCESSOR.limit(max_frames=6)


def test_layout_of_the_llava_repository_is_opened(root):
  """LLaVA-Video has newlines after each row, average pooling and times."""
  hf, folder = root
  model, got, config = convert.load_checkpoint(folder / "original", dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, got, onevision.convert(model, hf))
  assert (model.vision.newline, model.vision.pool) == ("grid", "average")
  processor = convert.load_processor(folder / "original", config, model, frames=8)
  assert processor == LlavaOnevisionProcessor(
    image=onevision.IMAGE, patch=onevision.PATCH, pinpoints=onevision.PINPOINTS,
    width=32, frames=64, newline="grid", pool="average", has_times=True,
  )  # fmt: skip


def test_layout_that_transformers_lacks_is_not_exported(root, tmp_path):
  _, folder = root
  _, variables, config = convert.load_checkpoint(folder / "original", dtype="float32")
  with pytest.raises(ValueError, match="mm_newline_position is 'grid'"):
    convert.save_checkpoint(tmp_path, variables["params"], config)


@pytest.mark.parametrize("name", ["hf", "original"])
@pytest.mark.parametrize("train_merger", [False, True])
def test_what_is_written_is_read_again(root, tmp_path, name, train_merger):
  hf, folder = root
  options = dict(dtype="float32", train_merger=train_merger)
  _, variables, config = convert.load_checkpoint(folder / name, **options)
  config = {**config, "mm_newline_position": "one_token"}
  for key in ("mm_spatial_pool_mode", "add_time_instruction"):
    config.pop(key, None)
  convert.save_checkpoint(tmp_path, variables["params"], config, **options)
  again = type(hf).from_pretrained(tmp_path).state_dict()
  for key, x in hf.state_dict().items():
    np.testing.assert_array_equal(again[key], x)


@pytest.mark.parametrize(
  "values, reason",
  [
    (dict(vision_feature_select_strategy="default"), "select_strategy must be one of"),
    (dict(multimodal_projector_bias=False), "projector_bias must be one of"),
    (dict(projector_hidden_act="swish"), "projector_hidden_act must be one of"),
    (dict(vision_feature_layer=9), "vision_feature_layer 9 must be one of"),
    (dict(use_image_newline_parameter=False), "use_image_newline_parameter must be"),
  ],
)
def test_unsupported_values_are_refused_by_name(root, values, reason):
  _, folder = root
  config, _ = families.read_family_config(folder / "hf")
  with pytest.raises(ValueError, match=reason):
    convert.make_model({**config, **values}, "float32")


@pytest.mark.parametrize(
  "key, value", [("add_faster_video", True), ("mm_spatial_pool_stride", 4)]
)
def test_unsupported_keys_of_the_original_layout_are_refused(
  root, tmp_path, key, value
):
  _, folder = root
  config = json.loads((folder / "original" / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
  with pytest.raises(ValueError, match=f"{key} must be"):
    families.convert_original(tmp_path, {**config, key: value}, {}, "")
