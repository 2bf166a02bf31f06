"""Adapters that PEFT writes give the logits that PEFT computes with them."""

import warnings

import numpy as np
import peft
import pytest
import torch

from tests.helpers import checkpoints as made
from vlmrlaif_jax.huggingface import convert

ATTENTION = ["q_proj", "v_proj"]
LANGUAGE = r".*language_model.*\.(q_proj|up_proj)"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A folder with a base of each kind."""
  root = tmp_path_factory.mktemp("bases")
  for text in ("llama", "qwen2"):
    made.llava(text).save_pretrained(root / text)
  return root


def write_trained(folder, base, text, config):
  """Saves an adapter whose trained values are random; returns PEFT's logits with it."""
  torch.manual_seed(3)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(made.llava(text), config)
    with torch.no_grad():
      for name, x in model.named_parameters():
        if x.requires_grad:
          x.add_(0.1 * torch.randn_like(x) * (0.2 if "magnitude" in name else 1))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(made.llava(text), folder)
  return made.theirs(loaded.eval().get_base_model())


CONFIGS = {
  "plain": dict(target_modules=ATTENTION),
  "rslora": dict(target_modules=ATTENTION, use_rslora=True),
  "dora": dict(target_modules=[*ATTENTION, "down_proj"], use_dora=True),
  "dora, rslora": dict(target_modules=ATTENTION, use_dora=True, use_rslora=True),
  "pissa": dict(target_modules=ATTENTION, init_lora_weights="pissa"),
  "pissa, dora": dict(
    target_modules=ATTENTION, init_lora_weights="pissa", use_dora=True
  ),
  "olora": dict(target_modules=ATTENTION, init_lora_weights="olora"),
  "orthogonal": dict(target_modules=ATTENTION, init_lora_weights="orthogonal"),
  "patterns": dict(
    target_modules=ATTENTION,
    rank_pattern={"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
    alpha_pattern={r"language_model\.layers\.0\..*": 5, "q_proj": 11},
  ),
  "layers_to_transform": dict(
    target_modules=ATTENTION, layers_to_transform=[1], layers_pattern="layers"
  ),
  "excluded": dict(target_modules=ATTENTION, exclude_modules=r".*vision_tower.*"),
  "pattern of targets": dict(target_modules=LANGUAGE),
  "all-linear": dict(target_modules="all-linear"),
  "projector": dict(target_modules=["linear_1", "q_proj"]),
  "modules_to_save": dict(
    target_modules=ATTENTION, modules_to_save=["multi_modal_projector", "lm_head"]
  ),
  "lm_head": dict(target_modules=["lm_head", "q_proj"]),
  "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
  "fan_in_fan_out": dict(target_modules=ATTENTION, fan_in_fan_out=True),
  "bias": dict(target_modules=ATTENTION, bias="all"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_with_an_adapter_equal_peft(root, tmp_path, name):
  config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **CONFIGS[name]})
  want = write_trained(tmp_path / "x", root / "llama", "llama", config)
  base = made.theirs(made.llava())
  assert np.abs(want - base).max() > 0.05
  got = made.ours(*convert.load_checkpoint(tmp_path / "x", dtype="float32")[:2])
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_biases_of_an_adapter_are_used(root, tmp_path):
  config = peft.LoraConfig(r=4, target_modules=ATTENTION, bias="lora_only")
  want = write_trained(tmp_path / "x", root / "qwen2", "qwen2", config)
  got = made.ours(*convert.load_checkpoint(tmp_path / "x", dtype="float32")[:2])
  np.testing.assert_allclose(got, want, atol=1e-4)


REFUSED = {
  "lora_bias": dict(lora_bias=True),
  "init_lora_weights='pissa_niter_4'": dict(init_lora_weights="pissa_niter_4"),
  "trainable_token_indices": dict(trainable_token_indices=[3]),
}


@pytest.mark.parametrize("key", REFUSED)
def test_setting_that_is_not_supported_is_named(root, tmp_path, key):
  config = peft.LoraConfig(r=4, target_modules=ATTENTION, **REFUSED[key])
  write_trained(tmp_path / "x", root / "llama", "llama", config)
  with pytest.raises(ValueError, match=f"adapter_config.json: {key}.*PEFT"):
    convert.load_checkpoint(tmp_path / "x", dtype="float32")


def test_update_of_an_output_matrix_unties_it(root, tmp_path):
  config = peft.LoraConfig(r=4, **CONFIGS["lm_head"])
  want = write_trained(tmp_path / "x", root / "qwen2", "qwen2", config)
  got = made.ours(*convert.load_checkpoint(tmp_path / "x", dtype="float32")[:2])
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_update_of_an_embedding_that_is_the_output_matrix_is_refused(root, tmp_path):
  config = peft.LoraConfig(r=4, **CONFIGS["embedding"])
  write_trained(tmp_path / "x", root / "qwen2", "qwen2", config)
  with pytest.raises(ValueError, match="tie_word_embeddings"):
    convert.load_checkpoint(tmp_path / "x", dtype="float32")


@pytest.mark.parametrize(
  "config",
  [
    peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    peft.LoHaConfig(target_modules=ATTENTION),
    peft.AdaLoraConfig(target_modules=ATTENTION, total_step=9),
    peft.VeraConfig(target_modules=["up_proj"]),
  ],
  ids=lambda config: config.peft_type.value,
)
def test_adapter_of_another_kind_is_named(root, tmp_path, config):
  model = peft.get_peft_model(made.llava(), config)
  model.peft_config["default"].base_model_name_or_path = str(root / "llama")
  model.save_pretrained(tmp_path)
  kind = config.peft_type.value
  with pytest.raises(ValueError, match=f'peft_type must be "LORA", got .{kind}'):
    convert.load_checkpoint(tmp_path)
