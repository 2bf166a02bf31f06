"""The best of n answers by what the policy itself thinks of them."""

import shutil

import numpy as np
import pytest

from tests.helpers.stage_runs import save, untrained_lora, untrained_policy
from tests.methods.roles import noisy
from vlmrlaif_jax.core import jsonl, sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import merge_params
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.runtime import answering, scoring
from vlmrlaif_jax.runtime.answering import SamplingSettings, VideoReply
from vlmrlaif_jax.sampling.generate import compute_response_logps
from vlmrlaif_jax.stages.evaluation import best_of_n, evaluate, policies
from vlmrlaif_jax.stages.stage import load_workdir_policies


@pytest.fixture(scope="module")
def models(one):
  """(a policy, its reference)."""
  start = untrained_policy(one)
  return tuple(merge_params(one.base, noisy(start, seed, 0.2)) for seed in (4, 5))


@pytest.fixture(scope="module")
def found(one, models, tmp_path_factory):
  folder = tmp_path_factory.mktemp("best")
  return kept(one, models, folder / "best.jsonl")


def kept(one, models, path):
  requests = [
    JudgeQuery(e["id"], e["video"], e["question"]) for e in one.splits.prompts[:3]
  ]
  return best_of_n.load_or_sample_candidates(one, *models, requests, sampling(), path)


def sampling():
  return SamplingSettings(64, 48, batch=2, temperature=1.0, samples=3)


def test_rewards_are_those_of_each_text_alone(one, models, found):
  mean, total, logp, ref_logp = (
    np.array([row[by] for row in found]) for by in ("mean", "total", "logp", "ref_logp")
  )
  assert mean.shape == total.shape == (3, 3)
  for i, example in enumerate(one.splits.prompts[:3]):
    for j, (text, *_) in enumerate(found[i]["replies"]):
      batch = scoring.make_scored_batch(one, [example], [text])
      batch = sharding.shard_batch(batch, one.mesh)
      settings = dict(start=one.config.data.prompt_len, chunk=64, temperature=1.0)
      logps = [compute_response_logps(one.policy, v, batch, **settings)[0].sum()
               for v in models]  # fmt: skip
      right = float(logps[0] - logps[1])
      np.testing.assert_allclose(total[i, j], right, rtol=2e-3, atol=2e-4)
      length = int(batch.loss_mask.sum())
      np.testing.assert_allclose(mean[i, j] * length, right, rtol=2e-3, atol=2e-3)
      np.testing.assert_allclose(logp[i, j] * length, logps[0], rtol=2e-3, atol=2e-3)
      np.testing.assert_allclose(
        ref_logp[i, j] * length, logps[1], rtol=2e-3, atol=2e-3
      )


def candidates(rewards, ended=True):
  replies = [VideoReply(str(i), ended is True or ended[i]) for i in range(len(rewards))]
  return [{"replies": replies, "mean": rewards}]


def chosen(made, count):
  return best_of_n.choose_best(made, "mean", count)[0].text


def test_best_of_one_is_the_first():
  assert chosen(candidates([-1.0, 2.0, 3.0]), 1) == "0"


def test_best_is_of_the_first_so_many():
  made = candidates([-1.0, 2.0, 3.0, -4.0])
  assert [chosen(made, n) for n in (2, 3, 4)] == ["1", "2", "2"]


def test_what_was_cut_is_taken_only_if_all_were():
  made = candidates([5.0, 1.0, 2.0], ended=[False, True, True])
  assert chosen(made, 3) == "2"
  assert chosen(candidates([5.0, 1.0], ended=[False, False]), 2) == "0"


def test_kept_ones_are_not_made_again(one, models, found, tmp_path, monkeypatch):
  path = tmp_path / "best.jsonl"
  first = kept(one, models, path)
  for row, other in zip(first, found, strict=True):
    np.testing.assert_allclose(row["mean"], other["mean"], rtol=1e-4, atol=1e-5)
    assert row["replies"] == other["replies"]
  monkeypatch.setattr(
    answering, "answer_requests", lambda *_, **__: pytest.fail("asked again")
  )
  again = kept(one, models, path)
  assert [[*map(tuple, row["replies"])] for row in first] == [
    [*map(tuple, row["replies"])] for row in again
  ]
  with pytest.raises(pytest.fail.Exception, match="asked again"):
    kept(one, models[::-1], path)


# In the evaluation.


def evaluated(one, workdir, **settings):
  """Measures the run of `one`, with a policy that DPO has trained."""
  shutil.copytree(one.workdir / "sft_long", workdir / "sft_long")
  config = one.config.copy_and_resolve_references()
  config.evaluate.update(batch=4, resamples=20)
  config.evaluate.held_out.update(settings)
  run = one._replace(workdir=workdir, config=config)
  save(run, "dpo_1", {"policy": noisy(untrained_lora(run), 6, 0.3)})
  with StageLog(workdir / "eval", "eval", 1) as log:
    evaluate.measure_policies(
      run, load_workdir_policies(run), None, workdir / "eval", log
    )


def test_evaluation_takes_the_best_of_the_last_policy_of_dpo(one, tmp_path):
  evaluated(one, tmp_path, best_of=(1, 3), bon_reward=("mean", "total"), judge=False)
  rows = jsonl.read_jsonl(tmp_path / "eval" / "answers.jsonl")
  names = ["dpo_1@1", "dpo_1@1:total", "dpo_1@3", "dpo_1@3:total"]
  assert [*rows[0]][5:-1] == ["sft", "dpo_1", *names]
  made = jsonl.read_jsonl(tmp_path / "eval/held_out/best_of_dpo_1.jsonl")[1:]
  assert [len(each["replies"]) for each in made] == [3] * len(rows)
  for row, each in zip(rows, made, strict=True):
    assert row["dpo_1@1"] == row["dpo_1@1:total"]
    assert row["dpo_1@3"]["text"] in [text for text, *_ in each["replies"]]


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"best_of": (0,)}, "best_of"),
    ({"best_of": (2,), "bon_reward": ("median",)}, "bon_reward .*median"),
    ({"best_of": (2,), "bon_top_p": 0.0}, "bon_temperature .*bon_top_p"),
  ],
)
def test_evaluation_refuses_what_has_no_meaning(one, settings, message):
  config = one.config.copy_and_resolve_references()
  config.evaluate.held_out.update(settings)
  with pytest.raises(UserError, match=f"--config.evaluate.held_out.{message}"):
    evaluate.check(config)


def test_evaluation_needs_a_policy_after_sft(one, tmp_path):
  with (
    StageLog(tmp_path, "eval", 1) as log,
    pytest.raises(UserError, match="evaluate.held_out.best_of"),
  ):
    policies.make_benchmark_policies(
      policies.EncodedRun(one, log), {"sft": one.base}, tmp_path, (2,)
    )
