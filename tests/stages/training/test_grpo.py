"""GRPO that samples for more prompts than it trains on."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.helpers import small
from tests.helpers.stage_runs import run_stage
from tests.stages.training.test_oracles import with_oracle
from vlmrlaif_jax.stages.training import common, grpo

RULE = """
def score(samples, quiet):
  return [s.seed / 2**32 * (0.01 if s.id in quiet else 1) for s in samples]
"""


def selecting(one, workdir, **settings):
  """A run of two steps that keeps two of four groups of three responses.

  The first and the third group of the first step hardly differ.
  """
  run = with_oracle(one, workdir, kind="reward")
  run.config.grpo.update(steps=2, oversample=2, samples_every=1, keep=2)
  run.config.grpo.truncated_responses = "keep"
  run.config.grpo.update(settings)
  workdir.mkdir(exist_ok=True)
  (workdir / "rule.py").write_text(RULE)
  indices = common.batch_indices(run, len(run.splits.prompts), 4, step=0)
  quiet = tuple(run.splits.prompts[i]["id"] for i in indices[::2])
  run.config.reward.terms.reward_model.weight = 0.0
  run.config.reward.terms.stop.weight = -0.001
  run.config.reward.terms.rule = {
    "fn": f"{workdir / 'rule.py'}:score",
    "kwargs": {"quiet": quiet},
  }
  return run


def samples(run, step):
  lines = (run.workdir / "grpo" / "samples" / f"step_{step}.jsonl").read_text()
  return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def whole(one, tmp_path_factory):
  """(the run, what it trained)."""
  run = selecting(one, tmp_path_factory.mktemp("selected") / "whole")
  return run, run_stage(run, "grpo")


def test_samples_are_those_of_the_groups_that_differ_most(one, whole, tmp_path):
  run, _ = whole
  plain = selecting(one, tmp_path / "plain", oversample=1, batch_size=4, steps=1)
  run_stage(plain, "grpo")
  every, kept = samples(plain, 1), samples(run, 1)
  assert (len(every), len(kept)) == (4 * 3, 2 * 3)
  spread = np.array([row["score"] for row in every]).reshape(4, 3).std(axis=1)
  best = np.sort(np.argsort(spread)[-2:])
  assert list(best) == [1, 3]
  for name in ("id", "prompt", "response", "score", "terms", "raw_terms", "truth"):
    want = [every[3 * group + i][name] for group in best for i in range(3)]
    assert [row[name] for row in kept] == want, name
  indices = common.batch_indices(run, len(run.splits.prompts), 4, step=0)
  asked = [run.splits.prompts[i]["id"] for i in indices]
  assert [row["id"] for row in every[::3]] == asked
  line, line_of_all = (
    small.metrics(run.workdir / "grpo")[0],
    small.metrics(plain.workdir / "grpo")[0],
  )
  assert line["reward_sampled"] == pytest.approx(line_of_all["reward"], rel=1e-5)
  assert line["tied_sampled"] == line_of_all["tied"] and line["learned"] == 1


def test_the_plan_samples_and_scores_more_prompts_than_it_trains_on(whole):
  planned = grpo.workload(whole[0], "grpo")
  passes = {
    each.phase: each.rows
    for function in planned.functions
    for group in function.passes.values()
    for each in group
    if each.role != "reward"
  }
  assert (planned.rows, passes["prefill"], passes["decode"]) == (4, 4, 4 * 3)
  assert (passes["forward"], passes["train"]) == (2, 2)


def test_a_resumed_run_selects_as_one_left_alone(whole, tmp_path):
  run, trained = whole
  shutil.copytree(run.workdir, tmp_path / "resumed")
  resumed = run._replace(workdir=tmp_path / "resumed")
  shutil.rmtree(resumed.workdir / "grpo" / "checkpoints" / "2")
  (resumed.workdir / "grpo" / "samples" / "step_2.jsonl").unlink()
  again = run_stage(resumed, "grpo")
  jax.tree.map(np.testing.assert_array_equal, again.state.params, trained.state.params)
  lines = small.metrics(run.workdir / "grpo")
  assert small.metrics(resumed.workdir / "grpo") == lines and len(lines) == 2
  assert samples(resumed, 2) == samples(run, 2)


def test_a_resumed_run_samples_ahead_as_one_left_alone(one, tmp_path):
  run = selecting(one, tmp_path / "whole", steps=4, keep=4, oversample=1)
  run.config.grpo.rollout.max_staleness = 2
  run.config.grpo.kl_anchor = "epoch_start"
  trained = run_stage(run, "grpo")
  shutil.copytree(run.workdir, tmp_path / "resumed")
  resumed = run._replace(workdir=tmp_path / "resumed")
  for step in (3, 4):
    shutil.rmtree(resumed.workdir / "grpo" / "checkpoints" / str(step))
    (resumed.workdir / "grpo" / "samples" / f"step_{step}.jsonl").unlink()
  again = run_stage(resumed, "grpo")
  jax.tree.map(np.testing.assert_array_equal, again.state.params, trained.state.params)
  lines = small.metrics(run.workdir / "grpo")
  assert small.metrics(resumed.workdir / "grpo") == lines
  assert [line["staleness"] for line in lines] == [
    step * run.config.grpo.epochs * run.config.grpo.minibatches for step in (0, 1, 2, 2)
  ]
  for step in (3, 4):
    assert samples(resumed, step) == samples(run, step)
