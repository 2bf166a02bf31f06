"""What stages that sample leave to look at: a step's answers, and the first's anew."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.helpers.stage_runs import run_stage
from vlmrlaif_jax.core.types import Collect, untimed
from vlmrlaif_jax.stages.training import oracles, rl, rollout_samples


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
  run_stage(run, "ppo", rl.ppo)
  paths = [workdir / "ppo" / "samples" / f"step_{step}.jsonl" for step in (1, 2)]
  return [[json.loads(line) for line in path.open()] for path in paths]


def test_first_prompts_are_asked_again_with_the_same_numbers(unmoved):
  first, second = unmoved
  again = [row for row in second if row.get("again")]
  assert len(again) == len(first) == 8 and not any(row.get("again") for row in first)
  said = lambda rows: [(row["id"], row["response"]) for row in rows]
  assert said(again) == said(first)
  for key in ("score", "kl", "advantage"):
    np.testing.assert_allclose(
      [row[key] for row in again], [row[key] for row in first], atol=1e-4
    )


def test_first_prompts_are_asked_of_the_policy_as_it_is_then(one, monkeypatch):
  config, asked = one.config.copy_and_resolve_references().ppo, []
  config.update(samples_every=2, samples=2)
  collect = Collect(
    lambda key, params, frozen, batch: asked.append((params, frozen, batch)),
    lambda params, frozen, begun, phase: (None, {}),
  )
  monkeypatch.setattr(rollout_samples, "read", lambda *given: given)
  again = rollout_samples.Again(
    one,
    config,
    [],
    collect,
    lambda step: f"data {step}",
    jax.random.key(0),
    lambda found: [{"n": n} for n in range(99)],
  )
  for step in range(4):
    again(step, f"params {step}", f"frozen {step}")
  # Steps 1 and 3 have files, and so has 0, which samples them itself.
  assert asked == [(f"params {n}", f"frozen {n}", "data 0") for n in (1, 3)]
  assert len(again.rows(3)) == 2 * rollout_samples.AGAIN and again.rows(2) == []


def test_a_step_has_its_own_prompts_before_them(unmoved):
  first, second = unmoved
  own = [row["id"] for row in second if not row.get("again")]
  assert own != [row["id"] for row in first] and len(own) == 8
  assert [row.get("again", False) for row in second] == [False] * 8 + [True] * 8


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
  assert [step for step in range(9) if rollout_samples.is_due(config, step)] == [
    0,
    2,
    5,
    8,
  ]


def test_answers_without_a_known_truth_are_held_against_their_reference():
  asked = [{"answer": answer} for answer in ("Red.", "Red.", "")]
  sampled = rollout_samples.Sampled(asked, ["Red.", "Blue.", "Red."], [None] * 3, {})
  assert rollout_samples.right(sampled) == {"met_reference": 0.5}


def test_answers_of_a_known_truth_are_right_without_a_mistake():
  asked = [{"answer": "Red."}] * 4
  sampled = rollout_samples.Sampled(asked, ["Blue."] * 4, [0, 2, 0, 0], {})
  assert rollout_samples.right(sampled) == {"truth": 0.75}


def test_what_is_asked_between_steps_is_not_told_of_a_step():
  scored = []
  collect = Collect(
    lambda key, params, frozen, batch: batch,
    lambda params, frozen, sampled, phase: scored.append(frozen["asked"]),
  )
  told = lambda: {"calls": float(len(scored))}
  oracle = oracles.Oracle(None, told, lambda: lambda example: [str(len(scored))])
  graded = rl._Graded(collect, oracle)
  begun = graded.begin(None, {}, {}, ("batch", "numbers"))
  graded.finish({}, {}, begun, untimed)
  graded.score({}, {}, begun, untimed)
  assert scored == ["numbers"] * 2
  assert graded.told == {"calls": 1.0} and oracle.told() == {"calls": 2.0}


@pytest.mark.parametrize(("judge", "asks"), [("self", True), ("endpoint", False)])
def test_a_server_is_not_asked_for_the_sake_of_the_report(one, judge, asks):
  config = one.config.copy_and_resolve_references().grpo
  config.oracle.judge = judge
  unused = lambda *given: None
  graded = rl._Graded(Collect(unused, unused), oracles.Oracle(unused))
  hooks = rl._group_hooks(one, config, [], graded, unused, jax.random.key(0), None)
  assert isinstance(hooks.look, rollout_samples.Again) is asks
