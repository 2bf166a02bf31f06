"""The merger as the projector gives the logits of the merger inside the tower."""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import qwen, qwen2_5
from vlmrlaif_jax.huggingface import convert, families
from vlmrlaif_jax.huggingface.param_mapping import convert_from_hf
from vlmrlaif_jax.models import vlm

FAMILIES = {"qwen3_vl": qwen, "qwen2_5_vl": qwen2_5}


@pytest.fixture(scope="module", params=FAMILIES)
def hf(request):
  return FAMILIES[request.param].pair()[0]


@functools.cache
def load(hf, *, train_merger):
  config = qwen.full_config(hf)
  model = convert.make_model(config, "float32", train_merger=train_merger)
  tensors = {name: x.numpy() for name, x in hf.state_dict().items()}
  if config["tie_word_embeddings"]:
    del tensors["lm_head.weight"]
  table = families.make_family_table(config, train_merger=train_merger)
  shapes = vlm.get_param_shapes(model)
  return model, {"params": convert_from_hf(table, tensors, shapes)}


def test_logits_are_those_of_transformers_with_the_merger_in_either_place(hf):
  want = qwen.their_logits(hf)
  assert np.std(want) > 0.3
  for train_merger in (False, True):
    got = qwen.our_logits(*load(hf, train_merger=train_merger))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_features_in_float16_change_logits_by_less_than_a_hundredth(hf):
  want = qwen.their_logits(hf)
  for train_merger in (False, True):
    half = qwen.our_logits(*load(hf, train_merger=train_merger), dtype="float16")
    assert 1e-5 < np.abs(half - want).max() < 0.01


def test_the_projector_has_the_merger_in_float32_and_the_tower_has_none(hf):
  model = convert.make_model(qwen.full_config(hf), "bfloat16", train_merger=True)
  shapes = vlm.get_param_shapes(model)
  mergers = families.FAMILIES[hf.config.model_type].models.MERGERS
  assert set(shapes["projector"]) == set(mergers)
  assert not set(shapes["vision"]) & set(mergers)
  dtypes = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
  assert dtypes(shapes["projector"]) == {"float32"}
  assert dtypes(shapes["vision"]) == {"bfloat16"}
