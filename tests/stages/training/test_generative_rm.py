"""Judges that are taught by SFT and by RL: what is trained, from where, and is told."""

import jax
import numpy as np
import pytest

from tests.helpers import small, stage_runs
from tests.helpers.stage_runs import run_stage
from tests.methods.roles import noisy
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.feedback.generative_rm import BRIEF_STYLE
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.stages.stage import load_workdir_policies
from vlmrlaif_jax.stages.training import generative_rm, rm

LENGTHS = dict(prompt_len=200, max_new=32)


@pytest.fixture
def run(one, tmp_path):
  """The run of `one` in a folder of its own, for a step of each judge."""
  return in_folder(one, tmp_path)


def in_folder(one, folder):
  (folder / "sft_long").symlink_to(one.workdir / "sft_long")
  (folder / "rm").symlink_to(one.workdir / "rm")
  config = one.config.copy_and_resolve_references()
  for section in (config.grm_sft, config.grm):
    section.update(batch_size=4, steps=1, save_every=1, **LENGTHS)
    section.optimizer.warmup_steps = 0
  config.grm.update(minibatches=1, samples=2, samples_every=1, start="sft")
  config.judges.update(batch=4, samples=2, resamples=20, **LENGTHS)
  return one._replace(workdir=folder, config=config)


def lora_of(params):
  return jax.tree.leaves(params["lora"])


def test_sft_teaches_the_lora_of_the_policy(run):
  done = run_stage(run, "grm_sft")
  assert set(done.state.params) == {"policy"}
  assert set(done.state.params["policy"]) == {"lora"}
  start = lora_of(done.start["policy"])
  moved = zip(lora_of(role_params.load_policy(run, "grm_sft")), start, strict=True)
  assert any(np.any(a != b) for a, b in moved)
  assert done.summary["pairs"] > 4 and done.summary["held_out"] > 0


def test_rl_tells_how_often_a_judge_is_right_and_is_not_understood(run):
  done = run_stage(run, "grm")
  assert set(done.state.params["policy"]) == {"lora"}
  [line] = small.metrics(run.workdir / "grm")
  # Random weights give no verdict.
  assert line["accuracy"] == 0 and line["unread"] == 1 and line["tied"] == 1
  assert done.summary["held_out_unread"] == 1
  assert set(role_params.load_judges(run)) == {"sft", "grm"}
  assert set(load_workdir_policies(run)) == {"sft"}  # It is none that answers.


@pytest.mark.parametrize("start", ["sft", "grm_sft"])
def test_rl_starts_from_the_judge_that_the_config_names(run, start):
  other = {"policy": noisy(stage_runs.untrained_lora(run), 5, 0.1)}
  stage_runs.save(run, "grm_sft", other)
  run.config.grm.start = start
  done = run_stage(run, "grm")
  begun, saved = (jax.tree.leaves(x["policy"]) for x in (done.start, other))
  equal = [np.array_equal(a, b) for a, b in zip(begun, saved, strict=True)]
  assert all(equal) if start == "grm_sft" else not any(equal)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"start": "ppo"}, "grm.start must be one of .* not 'ppo'"),
    ({"oracle.kind": "truth"}, "grm.oracle.kind must be \"verdict\", not 'truth'"),
  ],
)
def test_what_rl_cannot_learn_from_is_refused(run, settings, message):
  run.config.grm.update_from_flattened_dict(settings)
  with pytest.raises(UserError, match=message):
    generative_rm.check_grm(run.config)


def test_the_videos_held_out_are_those_of_the_reward_model(run, tmp_path):
  with stage_runs.StageLog(tmp_path / "log", "grm", 1) as log:
    learned, held = rm.split_preference_pairs(run, log, min_count=1)
  assert (learned, held) == pipeline.split_held_out(
    sorted(learned + held, key=lambda pair: pair["id"]), run.config.rm.holdout, 0
  )
  assert not {pair["video"] for pair in learned} & {pair["video"] for pair in held}


def test_a_judge_is_shown_pairs_as_they_stand():
  asked = []

  def ask(queries):
    asked.extend(queries)
    return ["Output A is better.", "Output B is better.", "Hm.", None]

  pairs = [
    {"id": f"p{i}", "video": "v", "question": "Why?", "output_1": "x", "output_2": "y"}
    for i in range(4)
  ]
  style = BRIEF_STYLE._replace(prompt="{question} {a} {b}")
  rows = generative_rm.make_prompted_judge(ask, style)(pairs)
  assert [query.prompt for query in asked] == ["Why? x y"] * 4
  assert len({query.id for query in asked}) == 4
  assert [row["choice"] for row in rows] == [1, 2, None, None]
