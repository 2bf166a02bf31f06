"""PEFT adapters: where they stand, how they are named, which are refused."""

import jax
import numpy as np
import pytest
import torch

from tests.helpers import checkpoints as made
from tests.helpers.rows import text_batch
from vlmrlaif_jax.huggingface import (
  checkpoint_layouts,
  convert,
  param_mapping,
  peft_adapters,
  published_names,
)
from vlmrlaif_jax.models import clip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.models.vlm import get_param_shapes

LLM = dict(vocab=64, embed=32, mlp=48, layers=2, heads=4, kv_heads=2)
MODEL = vlm.VLM(
  clip.VisionTower(**clip.VARIANTS["tiny"]),
  Projector(32),
  llama.Model(**LLM, rank=4, alpha=8.0),
  scalar_head=True,
)


def read(folder):
  return peft_adapters.read_adapter(folder, published_names.rename_published)


def whole_adapter(seed=0):
  """PEFT's tensors of random factors of every matrix."""
  rng = np.random.default_rng(seed)
  ones = np.ones((1, 2), int)
  batch = text_batch(np.zeros((1, 1, 16, 16, 3)), ones, ones > 0, ones > 0)
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0), batch)["lora"]
  random = lambda x: rng.normal(size=x.shape).astype(np.float32)
  ours = jax.tree.map(random, shapes)
  tensors = peft_adapters.convert_to_peft(ours["llm"])
  return {name: torch.tensor(x) for name, x in tensors.items()}


def test_factors_are_read_from_the_folder_below(tmp_path):
  tensors = whole_adapter()
  folder = tmp_path / "adapter_model" / "lora_default"  # As VLM-RLAIF publishes it.
  made.write_adapter(folder, tensors, "base", rank=4)
  found = read(tmp_path)
  assert len(found.factors) == 14
  first = found.factors["language_model.model.layers.0.self_attn.q_proj"]["A"]
  name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
  np.testing.assert_array_equal(first[:, :], tensors[name])


@pytest.mark.parametrize(
  "old, new",
  [
    (".weight", ".lora_default.weight"),
    ("model.model.layers", "model.model.language_model.layers"),
    ("model.model.layers", "model.language_model.model.layers"),
  ],
)
def test_names_of_every_version_are_known(tmp_path, old, new):
  tensors = whole_adapter()
  renamed = {name.replace(old, new): x for name, x in tensors.items()}
  made.write_adapter(tmp_path / "x", renamed, "base", rank=4)
  made.write_adapter(tmp_path / "y", tensors, "base", rank=4)
  assert set(read(tmp_path / "x").factors) == set(read(tmp_path / "y").factors)


def test_tensors_of_another_rank_than_the_config_are_refused(tmp_path):
  made.write_adapter(tmp_path / "x", made.factors(6), "base", rank=4)
  with pytest.raises(ValueError, match="has rank 6 .* r=4"):
    read(tmp_path / "x")


def test_published_7b_adapter_of_the_size_of_13b_is_refused(tmp_path):
  big = llama.VARIANTS["13b"]["embed"]
  name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
  table = checkpoint_layouts.make_llava_table(*convert.get_model_types(MODEL))
  shapes = param_mapping.get_hf_shapes(table, {"llm": get_param_shapes(MODEL)["llm"]})
  tensors = {name.format("A"): torch.ones(4, big), name.format("B"): torch.ones(big, 4)}
  made.write_adapter(tmp_path / "x", tensors, "vlm_sft_7b", rank=4)
  with pytest.raises(ValueError, match="layers of width 5120 .*13b") as error:
    peft_adapters.check_adapter_fits(read(tmp_path / "x"), shapes)
  assert "(5120, 5120) in the adapter, (32, 32) in the model" in str(error.value)


def test_factor_without_its_partner_is_refused(tmp_path):
  tensors = made.factors(4)
  del tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
  made.write_adapter(tmp_path / "x", tensors, "base", rank=4)
  with pytest.raises(ValueError, match="has only lora_A of .*0.mlp.down_proj"):
    read(tmp_path / "x")


def test_one_of_two_adapters_is_not_guessed(tmp_path):
  for name in ("lora_policy", "lora_value"):
    made.write_adapter(tmp_path / name, made.factors(4), "base", rank=4)
  with pytest.raises(ValueError, match="contains 2 adapters.* folder of one"):
    read(tmp_path)


def test_folder_without_an_adapter_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="no adapter_config.json in"):
    read(tmp_path)


def test_peft_names_and_shapes():
  factors = {"a": np.ones((2, 32, 4)), "b": np.ones((2, 4, 16))}
  tensors = peft_adapters.convert_to_peft({"blocks": {"k": factors}})
  name = "base_model.model.model.layers.{}.self_attn.k_proj.lora_{}.weight"
  assert {n: x.shape for n, x in tensors.items()} == {
    name.format(0, "A"): (4, 32),
    name.format(1, "A"): (4, 32),
    name.format(0, "B"): (16, 4),
    name.format(1, "B"): (16, 4),
  }
