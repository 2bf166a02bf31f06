"""Keys of configs that are refused, reported or harmless."""

import json
import os
import shutil

import pytest

from tests.helpers import checkpoints as made
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.huggingface.adapter_config import read_adapter_config
from vlmrlaif_jax.huggingface.checkpoint_folders import find_tokenizer_folder
from vlmrlaif_jax.huggingface.checkpoint_layouts import find_layout

LLAVA = made.llava()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A folder with a LLaVA of Hugging Face, an original one and its tower."""
  root = tmp_path_factory.mktemp("keys")
  LLAVA.save_pretrained(root / "hf")
  made.write_tower(root / "tower", LLAVA)
  made.write_original(root / "original", LLAVA)
  return root


def copy(source, folder, *, text=None, vision=None, **changes):
  """Copies a checkpoint, with other values in its config."""
  shutil.copytree(source, folder)
  config = json.loads((folder / "config.json").read_text()) | changes
  for part, values in (("text_config", text), ("vision_config", vision)):
    if values:
      config[part] = config[part] | values
  (folder / "config.json").write_text(json.dumps(config))
  return folder


REFUSED = {
  "quantization_config": dict(quantization_config={"load_in_4bit": True}),
  "text_config.quantization_config": dict(text={"quantization_config": {"bits": 4}}),
  "text_config.attn_logit_softcapping": dict(text={"attn_logit_softcapping": 50.0}),
  "text_config.num_local_experts": dict(text={"num_local_experts": 8}),
  "text_config.pruned_heads": dict(text={"pruned_heads": {"0": [1]}}),
  "mlp_bias": dict(text={"mlp_bias": True}),
  "attention_bias": dict(text={"attention_bias": True}),
  "hidden_act": dict(text={"hidden_act": "relu"}),
  "vision_config.hidden_act": dict(vision={"hidden_act": "relu"}),
  "num_channels": dict(vision={"num_channels": 4}),
  "projector_hidden_act": dict(projector_hidden_act="tanh"),
  "vision_feature_layer": dict(vision_feature_layer=[-2, -9]),
  "vision_feature_layer=": dict(vision_feature_layer=[-2, -3]),
  "vision_feature_select_strategy": dict(vision_feature_select_strategy="full"),
  "rope_type": dict(text={"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
  "rope_type.*dynamic": dict(text={"rope_scaling": {"type": "dynamic", "factor": 2}}),
  "rope_parameters.factor": dict(
    text={"rope_parameters": {"rope_type": "linear", "factor": "two"}}
  ),
  "low_freq_factor": dict(
    text={"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}
  ),
  "partial_rotary_factor": dict(
    text={"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
  ),
  "num_hidden_layers must be": dict(text={"num_hidden_layers": 10**8}),
  "num_hidden_layers": dict(text={"num_hidden_layers": "two"}),
  "image_size must be": dict(vision={"image_size": 24_000}),
  "patch_size": dict(vision={"patch_size": 0}),
  "num_key_value_heads": dict(text={"num_key_value_heads": 3}),
  "text_config": dict(text_config=[]),
}


@pytest.mark.parametrize("key", REFUSED)
def test_value_that_would_change_the_result_is_refused(root, tmp_path, key):
  folder = copy(root / "hf", tmp_path / "x", **REFUSED[key])
  with pytest.raises(ValueError, match=key):
    convert.load_checkpoint(folder, dtype="float32")


HARMLESS = dict(
  torch_dtype="float16", use_cache=False, attention_dropout=0.1, pretraining_tp=2,
  bos_token_id=1, temperature=0.7, max_length=20, id2label={"0": "A"},
  max_position_embeddings=64, _name_or_path="lmsys/vicuna-7b-v1.5",
)  # fmt: skip


def test_harmless_keys_are_not_reported(root, tmp_path):
  folder = copy(root / "hf", tmp_path / "x", text=HARMLESS, torch_dtype="float16")
  assert not any("not used" in note for note in find_layout(folder).notes)


def test_other_keys_are_reported_in_one_line(root, tmp_path):
  text = {"new_scale": 2.0, "unset": None, "sliding_window": 4}
  folder = copy(root / "hf", tmp_path / "x", text=text, image_grid_pinpoints=[[1, 2]])
  notes = [note for note in find_layout(folder).notes if "not used" in note]
  assert notes == [
    "config.json: keys that are not used: image_grid_pinpoints, "
    "text_config.new_scale, text_config.sliding_window"
  ]


@pytest.mark.parametrize("ratio", ["square", None, "anyres", "pad"])
def test_frames_are_padded_whatever_the_config_says(root, tmp_path, ratio):
  folder = copy(
    root / "original",
    tmp_path / "x",
    image_aspect_ratio=ratio,
    mm_vision_tower=str(root / "tower"),
  )
  notes = [note for note in find_layout(folder).notes if "aspect" in note]
  wanted = f"image_aspect_ratio={ratio!r} is not used: frames are padded to a square"
  assert notes == ([] if ratio == "pad" else [wanted])


@pytest.mark.parametrize(
  "key, value",
  [
    ("s2", True),
    ("mm_resampler_type", "perceiver"),
    ("mm_use_im_start_end", True),
    ("mm_patch_merge_type", "spatial_unpad"),
    ("quantization_config", {"bits": 4}),
    ("mm_vision_select_layer", [[1]]),
    ("mm_vision_tower", 3),
  ],
)
def test_key_of_the_original_layout_is_refused(root, tmp_path, key, value):
  more = {"mm_vision_tower": str(root / "tower"), key: value}
  folder = copy(root / "original", tmp_path / "x", **more)
  name = {"mm_vision_select_layer": "vision_feature_layer", "mm_vision_tower": "tower"}
  with pytest.raises((ValueError, FileNotFoundError), match=name.get(key, key)):
    convert.load_checkpoint(folder)


# Preprocessing.


@pytest.mark.parametrize(
  "config, note",
  [
    ({"do_center_crop": True, "crop_size": 16}, "pixels: do_center_crop=True"),
    ({"size": {"shortest_edge": 32}}, "pixels: size={'shortest_edge': 32}"),
    ({"resample": 2, "size": 16}, "pixels: resample=2"),
    ({"do_resize": False}, "pixels: do_resize=False"),
    ({"do_normalize": False}, "normalized by image_mean=[0.0, 0.0, 0.0]"),
  ],
)
def test_preprocessing_that_differs_is_reported(root, tmp_path, config, note):
  folder = copy(root / "hf", tmp_path / "x")
  (folder / "preprocessor_config.json").write_text(json.dumps(config))
  assert any(note in line for line in find_layout(folder).notes)


@pytest.mark.parametrize(
  "config, key",
  [
    ({"do_rescale": False}, "do_rescale"),
    ({"rescale_factor": 1.0}, "rescale_factor"),
    ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
    ({"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0.0]}, "image_std"),
    ([], "must contain a JSON object"),
  ],
)
def test_preprocessing_that_is_not_supported_is_refused(root, tmp_path, config, key):
  folder = copy(root / "hf", tmp_path / "x")
  (folder / "preprocessor_config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=key):
    find_layout(folder)


def test_preprocessing_inside_the_processor_config_is_read(root, tmp_path):
  folder = copy(root / "hf", tmp_path / "x")
  inner = {"image_processor": {"image_mean": [0.1] * 3, "image_std": [0.9] * 3}}
  (folder / "processor_config.json").write_text(json.dumps(inner))
  assert find_layout(folder).config["image_mean"] == (0.1, 0.1, 0.1)


# Damaged files.


@pytest.mark.parametrize("text", ["[]", "null", "3", "[" * 100_000, '{"model_type":'])
def test_config_without_an_object_is_refused(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config\.json"):
    find_layout(tmp_path)


def test_name_of_thirty_million_files_is_refused(root, tmp_path):
  folder = copy(root / "hf", tmp_path / "x")
  (folder / "model.safetensors").rename(folder / "model-00001-of-30000000.safetensors")
  with pytest.raises(ValueError, match="one of 30000000 files"):
    find_layout(folder)


def test_pipe_instead_of_weights_is_refused(root, tmp_path):
  folder = copy(root / "hf", tmp_path / "x")
  (folder / "model.safetensors").unlink()
  os.mkfifo(folder / "model.safetensors")
  with pytest.raises(ValueError, match="is not a regular file"):
    find_layout(folder)


# Adapters.


def write_adapter(folder, **changes):
  made.write_adapter(folder, made.factors(4), "base", rank=4)
  config = json.loads((folder / "adapter_config.json").read_text()) | changes
  (folder / "adapter_config.json").write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize(
  "key, value",
  [
    ("peft_type", "PROMPT_TUNING"),
    ("lora_bias", True),
    ("use_qalora", True),
    ("target_parameters", ["weight"]),
    ("layer_replication", [[0, 2]]),
    ("megatron_config", {"a": 1}),
    ("alora_invocation_tokens", [1]),
    ("a_key_of_tomorrow", 1),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", ["pissa"]),
    ("bias", "some"),
    ("r", 0),
    ("r", "four"),
    ("r", None),
    ("lora_alpha", None),
    ("lora_alpha", float("nan")),
    ("rank_pattern", [4]),
    ("rank_pattern", {"q_proj": -1}),
    ("alpha_pattern", {"(": 1}),
    ("layers_to_transform", "all"),
    ("target_modules", 3),
    ("use_dora", "yes"),
    ("base_model_name_or_path", ["x"]),
  ],
)
def test_key_of_an_adapter_is_refused(tmp_path, key, value):
  folder = write_adapter(tmp_path / "x", **{key: value})
  with pytest.raises(ValueError, match=r"adapter_config\.json.*" + key.split("_")[0]):
    read_adapter_config(folder)


def test_harmless_keys_of_an_adapter_are_accepted(tmp_path):
  harmless = dict(
    lora_dropout=0.1, inference_mode=True, task_type="CAUSAL_LM", peft_version="0.21",
    megatron_core="megatron.core", qalora_group_size=16, eva_config={"rho": 2.0},
    a_key_of_tomorrow=None, use_qalora=False, layer_replication=None,
  )  # fmt: skip
  assert read_adapter_config(write_adapter(tmp_path / "x", **harmless)).rank == 4


def test_revision_of_the_base_is_reported(tmp_path):
  folder = write_adapter(tmp_path / "x", revision="v2")
  assert read_adapter_config(folder).notes == (
    "revision='v2' of the base is not checked",
  )


@pytest.mark.parametrize("length", [1, 2])
def test_adapter_of_itself_is_refused(tmp_path, length):
  for i in range(length):
    base = str(tmp_path / str((i + 1) % length))
    folder = write_adapter(tmp_path / str(i), base_model_name_or_path=base)
    shutil.copy(folder / "adapter_config.json", folder / "config.json")
  for find in (find_layout, find_tokenizer_folder):
    with pytest.raises(ValueError, match="is an adapter of itself"):
      find(tmp_path / "0")


def test_adapter_above_its_checkpoints_is_the_adapter(root, tmp_path):
  folder = write_adapter(tmp_path / "x", base_model_name_or_path=str(root / "hf"))
  for step in (10, 20):
    write_adapter(folder / f"checkpoint-{step}")
  assert "rank 4 updates of 6 matrices" in find_layout(folder).notes[-1]


def test_adapter_in_a_folder_beside_its_checkpoints_is_the_adapter(root, tmp_path):
  write_adapter(tmp_path / "lora_default", base_model_name_or_path=str(root / "hf"))
  write_adapter(tmp_path / "checkpoint-10" / "lora_default")
  assert find_layout(tmp_path).name == "LoRA adapter on Hugging Face LLaVA"


def test_module_to_save_without_its_tensors_is_refused(root, tmp_path):
  more = dict(base_model_name_or_path=str(root / "hf"), modules_to_save=["lm_head"])
  folder = write_adapter(tmp_path / "x", **more)
  with pytest.raises(ValueError, match=r"lacks the tensors of \['lm_head'\]"):
    find_layout(folder)


def test_factors_of_a_layer_that_the_config_leaves_out_are_refused(root, tmp_path):
  more = dict(base_model_name_or_path=str(root / "hf"), layers_to_transform=[0])
  folder = write_adapter(tmp_path / "x", **more)
  with pytest.raises(
    ValueError, match="factors of model.layers.1.*layers_to_transform"
  ):
    find_layout(folder)
