"""Adapters of PEFT on families other than LLaVA give the logits of PEFT."""

import warnings

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers

from tests.helpers import qwen, qwen2_5
from vlmrlaif_jax.huggingface import checkpoint_folders, convert

TOWER = r".*visual\.blocks.*\.(qkv|\w*proj|\w+_fc\d)|.*merger.*(_fc\d|mlp\.[02])"
CONFIGS = {
  "language model": dict(target_modules=["q_proj", "v_proj", "down_proj"]),
  "tower and merger": dict(target_modules=TOWER),
  "all-linear, dora": dict(target_modules="all-linear", use_dora=True),
  "whole merger": dict(target_modules=["q_proj"], modules_to_save=["merger"]),
}


def write_published(folder):
  qwen2_5.write_checkpoint(folder / "new")
  qwen2_5.write_published(folder / "published", folder / "new")


WRITERS = {
  "qwen3_vl": qwen.write_checkpoint,
  "qwen2_5_vl": qwen2_5.write_checkpoint,
  "qwen2_5_vl published": write_published,
}


@pytest.fixture(scope="module", params=WRITERS)
def base(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  WRITERS[request.param](folder)
  return folder / "published" if (folder / "published").exists() else folder


def write_trained(folder, base, settings):
  """Saves an adapter whose trained values are random; returns PEFT's logits with it."""
  auto = transformers.AutoModelForImageTextToText
  load = lambda: auto.from_pretrained(base, dtype=torch.float32).eval()
  torch.manual_seed(3)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    model = peft.get_peft_model(load(), config)
    with torch.no_grad():
      for name, x in model.named_parameters():
        if x.requires_grad:
          x.add_(0.05 * torch.randn_like(x) * (0.2 if "magnitude" in name else 1))
    model.save_pretrained(folder)
    adapted = peft.PeftModel.from_pretrained(load(), folder).eval()
  return qwen.their_logits(load()), qwen.their_logits(adapted.get_base_model())


def test_logits_with_an_adapter_equal_peft(base, tmp_path):
  for name, settings in CONFIGS.items():
    folder = tmp_path / name
    before, want = write_trained(folder, base, settings)
    assert np.abs(want - before).max() > 0.01, name
    model, variables, _ = convert.load_checkpoint(folder, dtype="float32")
    got = qwen.our_logits(model, variables)
    np.testing.assert_allclose(got, want, atol=1e-4, err_msg=name)
    assert checkpoint_folders.find_processor_folder(folder) == base


def test_adapter_of_another_model_is_named(base, tmp_path):
  write_trained(tmp_path, base, CONFIGS["language model"])
  wide = tmp_path / "adapter_model.safetensors"
  tensors = safetensors.torch.load_file(wide)
  name = next(iter(tensors))
  tensors[name] = torch.zeros(4, 48)
  safetensors.torch.save_file(tensors, wide)
  with pytest.raises(ValueError, match="belongs to another model"):
    convert.load_checkpoint(tmp_path)
