"""Every published layout becomes the same model, and says which it was."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import checkpoints as made
from vlmrlaif_jax.huggingface import checkpoint_folders, checkpoint_layouts, convert


@pytest.fixture(scope="module")
def model():
  return made.llava()


@pytest.fixture(scope="module")
def root(model, tmp_path_factory):
  """A folder with a CLIP, an original LLaVA and a LLaMA in it."""
  root = tmp_path_factory.mktemp("layouts")
  made.write_tower(root / "tower", model)
  made.write_original(root / "original", model)
  made.write_plain(root / "llama", model)
  return root


def load(folder, **settings):
  """(model, variables, the line that tells what was found)."""
  lines = []
  found = convert.load_checkpoint(
    folder, dtype="float32", note=lines.append, **settings
  )
  return *found[:2], lines[0]


@pytest.fixture(scope="module")
def original(root):
  return load(root / "original")


def test_original_llava_has_the_logits_of_transformers(model, original):
  want = made.theirs(model)
  assert np.std(want) > 0.3  # Or any tolerance would do.
  np.testing.assert_allclose(made.ours(*original[:2]), want, atol=2e-5)


def test_line_tells_the_layout_and_what_is_left_over(original):
  assert original[2].partition("; vision tower from ")[0] == "original: original LLaVA"
  assert [note for note in original[2].split("; ") if "unused in" in note] == [
    "unused in original: buffers (1 rotary_emb.inv_freq)",
    "unused in tower: buffers (1 position_ids)",
    "unused in tower: not part of the tower (1 text_model, 1 logit_scale)",
  ]


def test_tower_inside_the_checkpoint_is_taken(model, root, original, tmp_path):
  folder = tmp_path / "inside"
  folder.mkdir()
  config = made.original_config(mm_vision_tower=str(root / "tower"))
  (folder / "config.json").write_text(json.dumps(config))
  inside = {
    f"model.vision_tower.vision_tower.{name}": 2 * x
    for name, x in made.tower_tensors(model).items()
  }
  tensors = made.language_tensors(model) | made.projector_tensors(model) | inside
  save_file(tensors, folder / "model.safetensors")
  _, variables, line = load(folder)
  assert "vision tower inside" in line
  double = jax.tree.map(lambda x: 2 * x, original[1]["params"]["vision"])
  jax.tree.map(np.testing.assert_array_equal, variables["params"]["vision"], double)


def test_llama_gets_the_tower_it_is_given_and_a_fresh_projector(root, original):
  _, variables, line = load(root / "llama", tower=str(root / "tower"))
  assert line.startswith("llama: plain LLaMA; vision tower from")
  assert "random projector" in line
  got, want = variables["params"], original[1]["params"]
  for part in ("llm", "vision"):
    jax.tree.map(np.testing.assert_array_equal, got[part], want[part])
  kernel = got["projector"]["linear_1"]["kernel"]
  assert 0.1 < np.std(kernel) * kernel.shape[0] ** 0.5 < 2


@pytest.mark.parametrize("text, name", [("qwen2", "Qwen2"), ("qwen3", "Qwen3")])
def test_plain_qwen_with_a_siglip_is_what_it_is_in_a_llava(tmp_path, text, name):
  model = made.llava(text, "siglip")
  model.save_pretrained(tmp_path / "llava")
  made.write_plain(tmp_path / "text", model)
  model.model.vision_tower.save_pretrained(tmp_path / "tower")
  _, variables, line = load(tmp_path / "text", tower=str(tmp_path / "tower"))
  assert line.startswith(f"text: plain {name}; vision tower from")
  assert "unused in tower: image pooling head (11 head)" in line
  got, want = variables["params"], load(tmp_path / "llava")[1]["params"]
  for part in ("llm", "vision"):
    jax.tree.map(np.testing.assert_array_equal, got[part], want[part])


def test_tower_of_an_unknown_kind_is_refused(root):
  with pytest.raises(ValueError, match="must be one of .*'siglip.*, got 'llama'"):
    load(root / "llama", tower=str(root / "llama"))


def test_llama_without_a_tower_is_refused(root):
  with pytest.raises(
    FileNotFoundError, match="is a language model without a vision tower"
  ):
    load(root / "llama")


def test_tower_that_is_not_there_is_named(root, tmp_path):
  folder = made.write_original(tmp_path / "x", made.llava())
  with pytest.raises(
    FileNotFoundError, match="'openai/tower', which is not a local folder"
  ):
    load(folder)


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"mm_projector_type": "ldp"}, "mm_projector_type must be one of .* got 'ldp'"),
    ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type must be 'flat'"),
    ({"mm_hidden_size": 64}, "mm_hidden_size is 64, but .* has 32 channels"),
    ({"hidden_size": 64}, r"down_proj.weight must have shape \(64, 48\), got"),
    ({"num_hidden_layers": 3}, r"missing from the checkpoint.*layers\.2\."),
  ],
)
def test_wrong_config_is_refused(root, tmp_path, wrong, message):
  folder = tmp_path / "wrong"
  folder.mkdir()
  config = made.original_config(mm_vision_tower=str(root / "tower")) | wrong
  for path in (root / "original").glob("pytorch_model*"):
    (folder / path.name).symlink_to(path)
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message):
    load(folder)


def test_unknown_model_type_is_refused(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "opt"}')
  with pytest.raises(ValueError, match="model_type must be .* got 'opt'"):
    checkpoint_layouts.find_layout(tmp_path)


def test_config_that_is_no_json_is_refused(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": ')
  with pytest.raises(ValueError, match=r"config\.json"):
    checkpoint_layouts.find_layout(tmp_path)


# LoRA in three pieces.


def test_three_pieces_equal_the_model_they_make(root, tmp_path):
  model, rank, alpha = made.llava(), 4, 8
  tensors = made.factors(rank)
  projector = {
    f"base_model.model.{name}": 1.5 * x.clone()
    for name, x in made.projector_tensors(model).items()
  }
  folder = made.write_adapter(
    tmp_path / "llava-lora", tensors, root / "llama", rank=rank, alpha=alpha
  )
  torch.save(projector, folder / "non_lora_trainables.bin")
  config = made.original_config(mm_vision_tower=str(root / "tower"))
  (folder / "config.json").write_text(json.dumps(config))
  ours, variables, line = load(folder)
  assert "LoRA adapter on original LLaVA" in line
  assert "merged: rank 4 updates of 6 matrices" in line
  assert "replaced: 4 multi_modal_projector" in line
  made.with_update(model, tensors, scale=alpha / rank)
  with torch.no_grad():
    for p in model.model.multi_modal_projector.parameters():
      p.mul_(1.5)
  np.testing.assert_allclose(made.ours(ours, variables), made.theirs(model), atol=2e-5)


def test_adapter_may_stand_below_and_its_tokenizer_with_its_base(root, tmp_path):
  base = tmp_path / "base"
  shutil.copytree(root / "original", base)
  (base / "tokenizer_config.json").write_text("{}")
  below = tmp_path / "x" / "adapter_model" / "lora_default"
  made.write_adapter(below, made.factors(4), base, rank=4)
  found = checkpoint_layouts.find_layout(tmp_path / "x", tower=str(root / "tower"))
  assert "LoRA adapter on original LLaVA" in found.name
  assert checkpoint_layouts.find_tokenizer_folder(tmp_path / "x") == base
  (below.parent.parent / "tokenizer.json").touch()
  assert checkpoint_layouts.find_tokenizer_folder(tmp_path / "x") == tmp_path / "x"
  assert checkpoint_folders.find_generation_folder(tmp_path / "x") == base
  (tmp_path / "x" / "generation_config.json").write_text("{}")
  assert checkpoint_folders.find_generation_folder(tmp_path / "x") == tmp_path / "x"


def test_adapter_whose_base_is_not_there_is_refused(tmp_path):
  folder = made.write_adapter(tmp_path / "x", made.factors(4), "no/base", rank=4)
  with pytest.raises(
    FileNotFoundError, match="of 'no/base', which is not a local folder"
  ):
    checkpoint_layouts.find_layout(folder)


def test_adapter_of_another_size_is_refused(root, tmp_path):
  tensors = made.factors(4, layers=3, scale=2)
  folder = made.write_adapter(tmp_path / "x", tensors, root / "original", rank=4)
  with pytest.raises(ValueError, match="3 layers of width 64") as error:
    load(folder)
  assert "(64, 64) in the adapter, (32, 32) in the model" in str(error.value)
