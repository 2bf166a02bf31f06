"""Which settings may change while a run goes on."""

import fnmatch

import pytest

from configs import common
from vlmrlaif_jax import free


def leaves(tree, at=""):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from leaves(value, f"{at}{name}.")
    else:
      yield f"{at}{name}"


CONFIG = common.recipe("ppo", (), "tiny")
KEYS = list(leaves(CONFIG.to_dict()))


@pytest.mark.parametrize("pattern", free.FREE)
def test_each_pattern_is_of_a_setting(pattern):
  assert fnmatch.filter(KEYS, pattern)


def test_what_an_optimiser_a_loss_or_a_text_reads_is_not_free():
  known = ("optimizer", "temperature", "kl_coef", "batch_size", "prompt_len", "steps")
  results = [key for key in KEYS if set(known) & set(key.split("."))]
  assert len(results) > 50 and not any(map(free.is_free, results))


def test_what_a_sweep_prints_is_free():
  for section in ("sft", "rm", "ppo", "grpo", "dpo", "grm_sft", "grm"):
    assert free.is_free(f"{section}.microbatches")
  assert all(map(free.is_free, (f"mesh.{axis}" for axis in CONFIG.mesh)))


def test_fixed_has_what_is_not_free_by_its_whole_name():
  found = free.fixed(CONFIG.claims, "claims")
  assert found["claims.samples"] == 10 and found["claims.endpoint.model"] == ""
  assert not {"claims.batch", "claims.block", "claims.endpoint.retries"} & set(found)
