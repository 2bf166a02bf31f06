"""Sizes that files of a checkpoint name are bounded before memory or time is used."""

import json
import os
import pathlib
import shutil
import struct
import time

import pytest
import torch

from vlmrlaif_jax.data.tokenization import load_tokenizer
from vlmrlaif_jax.huggingface import convert, tensor_files
from vlmrlaif_jax.runtime import run as run_lib

DEEP = "[" * 100_000


@pytest.fixture(params=["builtin:tiny", "builtin:tiny_qwen3vl"])
def folder(request, tmp_path):
  """A copy of a checkpoint that the package ships."""
  shutil.copytree(run_lib.resolve_checkpoint(request.param), tmp_path / "model")
  return tmp_path / "model"


@pytest.fixture(autouse=True)
def _bounded():
  """Each refusal is a matter of seconds."""
  start = time.monotonic()
  yield
  assert time.monotonic() - start < 20


def change(path, change):
  value = json.loads(path.read_text())
  change(value)
  path.write_text(json.dumps(value))


@pytest.mark.parametrize(
  ("part", "key", "value"),
  [
    ("text_config", "num_hidden_layers", 10**8),
    ("text_config", "vocab_size", 10**10),
    ("text_config", "hidden_size", 2**40),
    ("text_config", "intermediate_size", -1),
    ("vision_config", "patch_size", 10**9),
    ("vision_config", "num_channels", 10**9),
  ],
)
def test_a_size_of_a_config_is_bounded(folder, part, key, value):
  change(folder / "config.json", lambda config: config[part].update({key: value}))
  with pytest.raises(ValueError, match=f"{part}.{key} must be an integer from 1 to"):
    convert.load_checkpoint(folder, dtype="float32")


@pytest.mark.parametrize("folder", ["builtin:tiny"], indirect=True)
def test_the_size_of_images_is_bounded(folder):
  config = folder / "config.json"
  change(config, lambda config: config["vision_config"].update(image_size=24_000))
  with pytest.raises(ValueError, match=r"vision_config.image_size .* got 24000"):
    convert.load_checkpoint(folder, dtype="float32")


@pytest.mark.parametrize("folder", ["builtin:tiny_qwen3vl"], indirect=True)
@pytest.mark.parametrize(
  "key", ["num_position_embeddings", "spatial_merge_size", "out_hidden_size"]
)
def test_a_size_of_the_tower_of_a_family_is_bounded(folder, key):
  config = folder / "config.json"
  change(config, lambda config: config["vision_config"].update({key: 10**8}))
  with pytest.raises(ValueError, match=f"vision_config.{key} must be an integer"):
    convert.load_checkpoint(folder, dtype="float32")


JSON_FILES = ["config.json", "preprocessor_config.json", "tokenizer.json"]


def load(folder):
  model, _, config = convert.load_checkpoint(folder, dtype="float32")
  convert.load_processor(folder, config, model, frames=2)
  load_tokenizer(folder)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("fault", ["deep", "pipe", "device", "large"])
def test_a_damaged_file_is_named(folder, name, fault):
  path = folder / name
  path.unlink()
  if fault == "deep":
    path.write_text(DEEP)
  elif fault == "pipe":
    os.mkfifo(path)
  elif fault == "device":
    path.symlink_to("/dev/zero")
  else:
    path.touch()
    os.truncate(path, 10**10)
  with pytest.raises(ValueError, match=name):
    load(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json"])
def test_a_pipe_among_the_files_of_a_tokenizer_is_named(folder, name):
  (folder / name).unlink(missing_ok=True)
  os.mkfifo(folder / name)
  with pytest.raises(ValueError, match=f"{name} is not a regular file"):
    load_tokenizer(folder)


def replace(pattern, content):
  return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
  "steps",
  [
    [replace({"String": " "}, " " * 100)] * 6,  # 1e12 characters.
    [replace({"String": " "}, " " * 10**6)],
    [replace({"Regex": ""}, "a")] * 40,  # It doubles the text.
  ],
)
def test_a_tokenizer_that_makes_texts_huge_is_rejected(folder, steps):
  many = {"type": "Sequence", "normalizers": steps}
  change(folder / "tokenizer.json", lambda spec: spec.update(normalizer=many))
  with pytest.raises(ValueError, match="tokenizer.json: its Replace steps"):
    load_tokenizer(folder)


@pytest.mark.parametrize(
  "steps",
  [[replace({"String": " "}, "▁")] * 6, [replace({"String": "``"}, '"')] * 30],
)
def test_a_tokenizer_that_replaces_characters_is_loaded(folder, steps):
  many = {"type": "Sequence", "normalizers": steps}
  change(folder / "tokenizer.json", lambda spec: spec.update(normalizer=many))
  assert load_tokenizer(folder)("a").input_ids


def write_tensors(path, count):
  head = {
    f"layers.{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
    for i in range(count)
  }
  text = json.dumps(head).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(count))


def test_the_number_of_tensors_is_bounded(tmp_path):
  write_tensors(tmp_path / "model.safetensors", 300_000)
  with pytest.raises(ValueError, match=r"model.safetensors .* 300000 tensors"):
    tensor_files.open_folder(tmp_path)


def test_the_number_of_tensors_of_all_files_is_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(tensor_files, "MAX_TENSORS", 5)
  for i in (1, 2):
    write_tensors(tmp_path / f"model-0000{i}-of-00002.safetensors", 3)
    name = tmp_path / f"model-0000{i}-of-00002.safetensors"
    name.write_bytes(name.read_bytes().replace(b"layers.", b"%dayers." % i))
  with pytest.raises(ValueError, match="00002-of-00002.* have 6 tensors"):
    tensor_files.open_folder(tmp_path)


@pytest.mark.parametrize("value", [[], torch.zeros(1), {"a": 3}, {"a": {}}])
def test_a_bin_file_without_named_tensors_is_rejected(tmp_path, value):
  torch.save(value, tmp_path / "pytorch_model.bin")
  with pytest.raises(ValueError, match="must contain a dict of tensors"):
    tensor_files.open_folder(pathlib.Path(tmp_path))
