"""The samples that a rollout leaves for the report."""

import json
import shutil

import pytest

from tests.helpers.stage_runs import run_stage
from vlmrlaif_jax.stages.training import rollouts


@pytest.fixture(scope="module")
def unmoved(one, tmp_path_factory):
  """The samples of two steps of PPO that learn nothing: a list of rows for each."""
  workdir = tmp_path_factory.mktemp("samples")
  for part in ("sft_long", "rm"):
    shutil.copytree(one.workdir / part, workdir / part)
  config = one.config.copy_and_resolve_references()
  config.ppo.update(steps=2, samples_every=1, length_coef=-0.5)
  config.ppo.optimizer.update(learning_rate=0.0, warmup_steps=0)
  run = one._replace(workdir=workdir, config=config)
  run_stage(run, "ppo")
  paths = [workdir / "ppo" / "samples" / f"step_{step}.jsonl" for step in (1, 2)]
  return [[json.loads(line) for line in path.open()] for path in paths]


def test_terms_of_a_row_add_up_to_its_score(unmoved):
  for row in unmoved[0]:
    assert list(row["terms"]) == ["reward model", "no end", "length"]
    assert sum(row["terms"].values()) == pytest.approx(row["score"], abs=1e-5)


def test_videos_are_named_from_the_workdir_or_whole(unmoved, one):
  videos = {example["id"]: example["video"] for example in one.splits.prompts}
  assert all(videos[row["id"]].endswith(row["video"]) for row in unmoved[0])


def test_files_are_of_the_first_step_and_of_every_so_many(one):
  config = one.config.copy_and_resolve_references().ppo
  config.samples_every = 3
  assert [step for step in range(9) if rollouts.should_log_samples(config, step)] == [
    0,
    2,
    5,
    8,
  ]


def test_answers_without_a_known_truth_are_held_against_their_reference():
  asked = [{"answer": answer} for answer in ("Red.", "Red.", "")]
  sampled = rollouts.StepSamples(asked, ["Red.", "Blue.", "Red."], [None] * 3, {})
  assert rollouts.compute_accuracy(sampled) == {"met_reference": 0.5}


def test_answers_of_a_known_truth_are_right_without_a_mistake():
  asked = [{"answer": "Red."}] * 4
  sampled = rollouts.StepSamples(asked, ["Blue."] * 4, [0, 2, 0, 0], {})
  assert rollouts.compute_accuracy(sampled) == {"truth": 0.75}
