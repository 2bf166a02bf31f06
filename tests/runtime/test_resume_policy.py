"""Which settings may change while a run goes on."""

import fnmatch

import numpy as np
import pytest

from tests.helpers import small
from vlmrlaif_jax.core import interrupts
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.runtime import resume_policy


def leaves(tree, at=""):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from leaves(value, f"{at}{name}.")
    else:
      yield f"{at}{name}"


CONFIG = small.all_sections()
KEYS = list(leaves(CONFIG.to_dict()))


@pytest.mark.parametrize("pattern", resume_policy.FREE_SETTINGS)
def test_each_pattern_is_of_a_setting(pattern):
  assert fnmatch.filter(KEYS, pattern)


def test_what_an_optimiser_a_loss_or_a_text_reads_is_not_free():
  known = ("optimizer", "temperature", "kl_coef", "batch_size", "prompt_len", "steps")
  results = [key for key in KEYS if set(known) & set(key.split("."))]
  assert len(results) > 50 and not any(map(resume_policy.is_free, results))


def test_checkpoints_that_are_chosen_from_stay_as_they_are():
  assert resume_policy.is_free("ppo.keep") and resume_policy.is_free("ppo.save_every")
  assert not resume_policy.is_free("dpo.keep")
  assert not resume_policy.is_free("dpo.save_every")


def test_what_a_sweep_prints_is_free():
  for section in ("sft", "rm", "ppo", "grpo", "dpo", "grm_sft", "grm"):
    assert resume_policy.is_free(f"{section}.microbatches")
  assert all(map(resume_policy.is_free, (f"mesh.{axis}" for axis in CONFIG.mesh)))


def test_fixed_has_what_is_not_free_by_its_whole_name():
  found = resume_policy.select_fixed_settings(CONFIG.claims, "claims")
  assert found["claims.samples"] == 10 and found["claims.endpoint.model"] == ""
  assert not {"claims.batch", "claims.block", "claims.endpoint.retries"} & set(found)


# A run that goes on.

STEPS = 3
OTHERWISE = {
  "mesh__data": 2,
  "mesh__fsdp": 1,
  "mesh__tensor": 2,
  "sft__microbatches": 2,
  "sft__chunk": 16,
  "sft__save_every": 1,
  "sft__keep": 2,
  "model__attention": "xla",
  "model__remat": "full",
}


@pytest.fixture
def run(tiny_settings, tmp_path, monkeypatch):
  """Runs a stage of SFT in a workdir by its name, to which it returns the path."""
  # The report is not what is tested.
  monkeypatch.setattr(runner.page, "write_report", lambda root: root / "report.html")

  def run(name, stop=lambda: False, **settings):
    given = {**tiny_settings, "sft.short_steps": STEPS}
    config = small.config(given, ("sft_short",), **settings)
    runner.run_recipe(config, str(tmp_path / name), stop)
    return tmp_path / name / "sft_short"

  return run


def test_a_run_goes_on_on_another_mesh_in_other_parts_by_other_kernels(run, tmp_path):
  metrics = tmp_path / "begun" / "sft_short" / "metrics.jsonl"
  with pytest.raises(interrupts.Stopped, match=f"step 1 of {STEPS} is done"):
    run("begun", lambda: metrics.exists() and metrics.stat().st_size > 0)
  with pytest.raises(UserError, match="sft.batch_size: 4 in the workdir, 8 now"):
    run("begun", **OTHERWISE, sft__batch_size=8)
  got, want = small.metrics(run("begun", **OTHERWISE)), small.metrics(run("alone"))
  assert [line["step"] for line in got] == [1, 2, 3]
  for here, there in zip(got, want, strict=True):
    assert here.keys() == there.keys()
    for name, value in there.items():
      np.testing.assert_allclose(here[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
