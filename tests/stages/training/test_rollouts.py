"""The samples that a rollout leaves for the report."""

import json
import shutil

import pytest

from tests.helpers import small
from tests.helpers.stage_runs import run_stage
from vlmrlaif_jax.report.sources import make_stage_source
from vlmrlaif_jax.report.stages import collect_stage
from vlmrlaif_jax.stages.training import rollouts


@pytest.fixture(scope="module")
def workdir(one, tmp_path_factory):
  """A workdir with two steps of PPO that learn nothing, by four terms."""
  workdir = tmp_path_factory.mktemp("samples")
  for part in ("sft_long", "rm"):
    shutil.copytree(one.workdir / part, workdir / part)
  config = one.config.copy_and_resolve_references()
  config.ppo.update(steps=2, samples_every=1)
  config.reward.terms.length.weight = -0.5
  rule = "examples/rewards/brevity.py:score_brevity"
  config.reward.terms.brevity = {"fn": rule, "kwargs": {"words": 2}}
  config.ppo.optimizer.update(learning_rate=0.0, warmup_steps=0)
  run = one._replace(workdir=workdir, config=config)
  run_stage(run, "ppo")
  return workdir


@pytest.fixture(scope="module")
def unmoved(workdir):
  """The rows of the samples of each step."""
  paths = [workdir / "ppo" / "samples" / f"step_{step}.jsonl" for step in (1, 2)]
  return [[json.loads(line) for line in path.open()] for path in paths]


def test_terms_of_a_row_add_up_to_its_score(unmoved):
  for row in unmoved[0]:
    assert list(row["terms"]) == ["brevity", "length", "reward_model", "stop"]
    assert sum(row["terms"].values()) == pytest.approx(row["score"], abs=1e-5)


def test_terms_of_a_row_are_raw_and_weighted(unmoved):
  for row in unmoved[0]:
    raw, weighted = row["raw_terms"], row["terms"]
    assert list(raw) == list(weighted)
    for name, weight in (("brevity", 1), ("length", -0.5), ("stop", -1)):
      assert weighted[name] == pytest.approx(weight * raw[name])
    assert raw["stop"] == (not row["has_stop"])


def test_the_report_shows_each_term(workdir):
  [line, _] = small.metrics(workdir / "ppo")
  for name, weight in (("brevity", 1), ("length", -0.5), ("stop", -1)):
    value = line[f"terms/{name}"]
    assert line[f"terms/{name}/weighted"] == pytest.approx(weight * value)
  charts = {chart["title"]: chart for chart in collect_stage(workdir, "ppo")["charts"]}
  for title in ("terms of the reward", "weighted terms of the reward"):
    names = [drawn["name"] for drawn in charts[title]["lines"]]
    assert names == ["brevity", "length", "reward_model", "stop"]
  [source] = make_stage_source(workdir, "ppo")
  answers = [answer for group in source["groups"] for answer in group["answers"]]
  assert all(len(answer["terms"]) == 4 for answer in answers)
  assert all(answer["raw_terms"].keys() == answer["terms"].keys() for answer in answers)


def test_videos_are_named_from_the_workdir_or_whole(unmoved, one):
  videos = {example["id"]: example["video"] for example in one.splits.prompts}
  assert all(videos[row["id"]].endswith(row["video"]) for row in unmoved[0])


@pytest.mark.parametrize(
  "section, remedy",
  [("ppo", "tis_max=2$"), ("grpo", "tis_max=2 and old_logps=computed")],
)
def test_servers_require_importance_weights(one, section, remedy):
  config = one.config.copy_and_resolve_references()[section]
  config.rollout.engine = "vllm"
  with pytest.raises(ValueError, match=f"^tis_max=0 .*vllm.* set {remedy}"):
    rollouts.check(config)
  config.tis_max = 2.0
  rollouts.check(config)


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
