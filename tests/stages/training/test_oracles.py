"""Oracles as recipes ask for them: each ranks, and trains a policy."""

import json
import re
import shutil
import zlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from werkzeug import Response

from tests.feedback.chat_server import PATH, completion
from tests.helpers import small
from tests.helpers.rows import text_batch
from tests.helpers.stage_runs import run_stage
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.runtime import answering, role_params
from vlmrlaif_jax.stages.stage import load_workdir_policies
from vlmrlaif_jax.stages.training import grpo, oracles
from vlmrlaif_jax.training import checkpoint


def with_oracle(one, workdir, **settings):
  """The run of `one` in a folder of its own, for a step of GRPO on two prompts."""
  if not workdir.exists():
    for part in ("sft_long", "rm"):
      shutil.copytree(one.workdir / part, workdir / part)
  config = one.config.copy_and_resolve_references()
  config.grpo.update(batch_size=2, steps=1, save_every=1, minibatches=1)
  config.grpo.samples = 3
  config.grpo.optimizer.warmup_steps = 0
  config.grpo.oracle.update(batch=8, **settings)
  return one._replace(workdir=workdir, config=config)


@pytest.mark.parametrize("kind", ["reward", "reward_rank", "truth"])
def test_grpo_trains_the_policy_alone(one, tmp_path, kind):
  run = with_oracle(one, tmp_path / kind, kind=kind)
  rule = "examples/rewards/brevity.py:score_brevity"
  run.config.reward.terms.brevity = {"fn": rule}
  run.config.reward.combine = "group" if kind == "reward" else "sum"
  done = run_stage(run, "grpo")
  assert set(done.state.params) == {"policy"}
  [line] = small.metrics(run.workdir / "grpo")
  assert line["invalid"] == 0 and np.isfinite(line["loss"])
  if kind != "reward":  # Ranks are reported as win rates.
    assert 0 <= line["reward"] <= 1
  names = {key.split("/")[1] for key in line if key.startswith("terms/")}
  assert names == (set() if kind == "truth" else {"brevity", "reward_model", "stop"})
  assert set(load_workdir_policies(run)) == {"sft", "grpo"}
  rows = (run.workdir / "grpo" / "samples" / "step_1.jsonl").read_text().splitlines()
  assert len(rows) == 2 * 3
  first = json.loads(rows[0])
  assert first["id"] == json.loads(rows[2])["id"]
  if kind == "reward":
    assert sum(first["terms"].values()) == pytest.approx(first["score"], abs=1e-5)


def batch_of(run, texts):
  """A batch of responses that say these texts."""
  tok = run.tokenizer
  ids = [tok(text, add_special_tokens=False)["input_ids"] for text in texts]
  longest = max(map(len, ids))
  mask = np.array([[True] * len(i) + [False] * (longest - len(i)) for i in ids])
  tokens = np.array([i + [tok.pad_token_id] * (longest - len(i)) for i in ids])
  return text_batch(np.zeros((len(texts), 1, 1, 1)), tokens, mask, mask)


def test_truth_puts_what_is_right_first(one, tmp_path):
  run = with_oracle(one, tmp_path / "truth", kind="truth")
  examples = [e for e in run.splits.prompts if e["truth"]["kind"] != "description"][:2]
  score = oracles.make_oracle(run, run.config.grpo.oracle, examples, tmp_path).score
  said = [["Blue rain.", e["truth"]["answer"], "Nothing."] for e in examples]
  batch = batch_of(run, [text for texts in said for text in texts])
  scores, valid = score({"example_ids": np.array([0, 1])}, batch)
  np.testing.assert_array_equal(scores, [-1, 0, -1] * 2)
  assert valid.all()


def test_a_judge_that_says_nothing_of_use_ends_the_run(one, tmp_path):
  run = with_oracle(one, tmp_path / "pairs", kind="pairs", prompt_len=200, max_new=2)
  examples = run.splits.prompts[:1]
  score = oracles.make_oracle(run, run.config.grpo.oracle, examples, tmp_path).score
  with pytest.raises(UserError, match="scored no response to any of 1 prompts"):
    score({"example_ids": np.array([0])}, batch_of(run, ["Red.", "Blue."]))


def test_noise_reorders_pairs_and_keeps_the_ranks(one, tmp_path):
  run = with_oracle(one, tmp_path / "noise", kind="truth", noise=0.5)
  example = next(e for e in run.splits.prompts if e["truth"]["kind"] == "description")
  right = example["truth"]["answer"]
  texts = [right, f"{right} Nonsense.", f"{right} Non. Sense.", f"{right} A. B. C."]
  score = oracles.make_oracle(run, run.config.grpo.oracle, [example], tmp_path).score
  scores, _ = score({"example_ids": np.array([0])}, batch_of(run, texts))
  again, _ = score({"example_ids": np.array([0])}, batch_of(run, texts))
  assert sorted(scores) == [-3, -2, -1, 0] and list(scores) != [0, -1, -2, -3]
  np.testing.assert_array_equal(scores, again)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"kind": "guess"}, "oracle.kind must be one of .* not 'guess'"),
    ({"judge": "nobody"}, "oracle.judge must be one of .* not 'nobody'"),
    ({"grm_stage": "rm"}, "oracle.grm_stage must be one of .* not 'rm'"),
    ({"kind": "grm", "noise": 0.1}, "oracle.noise=0.1"),
    ({"kind": "truth", "noise": 1.5}, "oracle.noise must be at most 1, not 1.5"),
    ({"kind": "reward", "noise": 0.1}, "oracle.noise=0.1"),
  ],
)
def test_unknown_oracles_are_refused(one, tmp_path, settings, message):
  run = with_oracle(one, tmp_path / "bad", **settings)
  with pytest.raises(ValueError, match=message):
    oracles.check(run.config.grpo.oracle)


class Scorer:
  """A judge of ours that scores the longer answer higher, and keeps the requests."""

  def __init__(self, unread=False):
    self.unread, self.asked = unread, []

  def __call__(self, run, variables, requests, sampling, *, seed):
    self.asked += requests
    sides = [re.search("A: (.*) Output B: (.*) Which", r.prompt) for r in requests]
    better = ["A" if len(side[1]) > len(side[2]) else "B" for side in sides]
    texts = ["Hm." if self.unread else f"Output {b} is better." for b in better]
    return [[answering.VideoReply(text, True)] for text in texts]


def compared(one, workdir, monkeypatch, judge, **settings):
  """The oracle "grm" with this judge, and (scores, valid) of two groups of answers."""
  monkeypatch.setattr(answering, "answer_requests", judge)
  settings = {"grm_stage": "sft", **settings}
  run = with_oracle(one, workdir, kind="grm", **settings)
  examples = run.splits.prompts[:2]
  oracle = oracles.make_oracle(run, run.config.grpo.oracle, examples, workdir)
  batch = batch_of(run, ["Red.", "A red.", "Red.", "Blue.", "A blue.", "No."])
  ended = np.full((6, 1), run.stops[0])
  tokens = np.concatenate([batch.tokens, ended], axis=1)
  mask = np.concatenate([batch.loss_mask, ended > -1], axis=1)
  return oracle, oracle.score(
    {"example_ids": np.array([0, 1])}, batch._replace(tokens=tokens, loss_mask=mask)
  )


def test_a_generative_judge_compares_groups_and_tells_how_often(
  one, tmp_path, monkeypatch
):
  judge = Scorer()
  oracle, (scores, valid) = compared(one, tmp_path / "grm", monkeypatch, judge)
  assert valid.all()
  assert scores[0] == scores[2] < scores[1] and scores[5] < scores[3] < scores[4]
  # Two orders of one pair, what is said twice being asked once, and of three.
  assert oracle.get_metrics() == {"judge_calls": 2 + 6, "judge_unread": 0}
  assert len({request.id for request in judge.asked}) == 8


def test_what_a_judge_said_is_kept_by_the_example_it_was_said_of(
  one, tmp_path, monkeypatch
):
  oracle, _ = compared(one, tmp_path / "said", monkeypatch, Scorer(), both_orders=False)
  first, second = one.splits.prompts[:2]
  # What is said twice is compared once, and four verdicts are shown at most.
  assert oracle.list_replies(first) == [
    f"{first['question']} Output A: Red. Output B: A red. Which is better?"
    " → Output B is better."
  ]
  assert len(oracle.list_replies(second)) == 3
  assert oracle.list_replies({**first, "id": "of another"}) == []


def test_a_generative_judge_may_see_one_order(one, tmp_path, monkeypatch):
  settings = dict(both_orders=False)
  oracle, _ = compared(one, tmp_path / "one", monkeypatch, Scorer(), **settings)
  assert oracle.get_metrics()["judge_calls"] == 1 + 3


def test_a_generative_judge_that_scores_nothing_ends_the_run(
  one, tmp_path, monkeypatch
):
  with pytest.raises(UserError, match="scored no response to any of 2 prompts"):
    compared(one, tmp_path / "no", monkeypatch, Scorer(unread=True))


def test_grpo_logs_what_a_generative_judge_was_asked(one, tmp_path):
  run = with_oracle(
    one, tmp_path / "grpo", kind="grm", grm_stage="sft", prompt_len=200, max_new=2
  )
  run_stage(run, "grpo")
  [line] = small.metrics(run.workdir / "grpo")
  # Random weights give no verdict, so nothing is learned.
  assert line["judge_unread"] == (line["judge_calls"] > 0)
  assert line["learned"] == 0


def answer_about_claims(run, variables, requests, sampling, *, seed):
  """A judge that finds one claim in a text, and accepts it half of the time."""
  assert (sampling.prompt_len, sampling.max_new) == (300, 16)
  replies = {"List": "- It is red.", "Turn": "- Is it red?", "Does": "yes"}
  texts = [
    replies.get(r.prompt.split()[0], "Yes." if zlib.crc32(r.id.encode()) % 2 else "No.")
    for r in requests
  ]
  return [[answering.VideoReply(text, True)] for text in texts]


def test_the_policy_judges_the_claims_of_its_own_responses(one, tmp_path, monkeypatch):
  monkeypatch.setattr(answering, "answer_requests", answer_about_claims)
  run = with_oracle(one, tmp_path / "claims", kind="reward")
  settings = {"judge": "self", "style": "brief"}
  run.config.reward.terms = ConfigDict({"claims": {"kwargs": settings}})
  run.config.reward.self_judge.update(prompt_len=300, max_new=16, batch=4)
  run_stage(run, "grpo")
  [line] = small.metrics(run.workdir / "grpo")
  assert line["invalid"] == 0 and np.isfinite(line["loss"])
  assert -1 <= line["terms/claims"] <= 1
  [judge] = grpo._make_judge_functions(run, run.config.grpo)
  assert judge.name == "judge"


def test_a_policy_that_writes_no_readable_judgements_ends_the_run(one, tmp_path):
  run = with_oracle(one, tmp_path / "unread", kind="reward")
  kwargs = {"kwargs": {"judge": "self"}}
  run.config.reward.terms = ConfigDict({"judge": kwargs, "rank": kwargs})
  run.config.reward.self_judge.update(prompt_len=300, max_new=2, batch=4)
  with pytest.raises(UserError) as error:  # Random weights.
    run_stage(run, "grpo")
  message = str(error.value)
  assert "6 of 6 samples have no score (judge 6" in message
  assert any(example["id"] in message for example in run.splits.prompts)
  assert "judge: the judge's reply has no score" in message


def test_verdicts_are_of_prompts_that_ask_for_one(one, tmp_path):
  run = with_oracle(one, tmp_path / "verdict", kind="verdict")
  with pytest.raises(UserError, match="oracle.kind=verdict"):
    oracles.make_oracle(run, run.config.grpo.oracle, run.splits.prompts, tmp_path)
  example = {"id": "a", "truth": {"better": 2}}
  oracle = oracles.make_oracle(run, run.config.grpo.oracle, [example], tmp_path)
  batch = batch_of(run, ["Output B is better.", "Output A is better.", "Hm."])
  tokens = np.where(batch.loss_mask, batch.tokens, run.stops[0])
  tokens = np.concatenate([tokens, np.full((3, 1), run.stops[0])], axis=1)
  batch = batch._replace(tokens=tokens, loss_mask=np.ones(tokens.shape, bool))
  scores, valid = oracle.score({"example_ids": np.array([0])}, batch)
  np.testing.assert_array_equal(scores, [1, 0, 0])
  assert valid.all()
  assert oracle.get_metrics() == pytest.approx({"accuracy": 1 / 3, "unread": 1 / 3})


def test_the_anchor_is_taken_anew_every_epoch_and_after_a_kill(one, tmp_path):
  run = with_oracle(one, tmp_path / "anchor", kind="truth")
  config = run.config.grpo
  config.update(steps=3)
  config.kl_anchor = "epoch_start"
  config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
  params, frozen = role_params.make_policy_roles(run, role_params.SFT_STAGES[1])
  moved = lambda by: jax.tree.map(lambda x: x + by, params)
  folder = run.workdir / "grpo"
  hook = grpo._make_reference_hook(frozen["policy"], params, folder, 2)
  said = lambda laid: float(jax.tree.leaves(laid["ref"]["lora"])[0].ravel()[0])
  start = said({"ref": params["policy"]})
  assert said(hook(0, params)) == start
  assert hook(1, moved(1.0)) == {}
  assert said(hook(2, moved(2.0))) == pytest.approx(start + 2)
  anew = grpo._make_reference_hook(frozen["policy"], params, folder, 2)
  assert said(anew(3, moved(3.0))) == pytest.approx(start + 2)
  assert checkpoint.get_latest_step(str(folder / "anchor")) == 2
  # A run that goes on from before the last anchor finds the one of its own step.
  earlier = grpo._make_reference_hook(frozen["policy"], params, folder, 2)
  assert said(earlier(1, moved(1.0))) == start
  assert said(earlier(2, moved(9.0))) == pytest.approx(start + 2)


# A server that judges.


def at_server(one, workdir, httpserver, monkeypatch, **settings):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
  server = dict(url=httpserver.url_for("/v1"), model="m", key_env="", retries=0)
  run = with_oracle(one, workdir, kind="list", judge="endpoint")
  run.config.grpo.oracle.endpoint.update(**server, concurrency=1, **settings)
  return run


def test_a_server_that_refuses_every_query_ends_grpo(
  one, tmp_path, httpserver, monkeypatch
):
  error = {"error": {"message": "At most 1 image(s) may be provided."}}
  httpserver.expect_request(PATH).respond_with_json(error, status=400)
  run = at_server(one, tmp_path / "refused", httpserver, monkeypatch)
  with pytest.raises(UserError, match=r"http 400: At most 1 image.*frames=8"):
    run_stage(run, "grpo")


def test_a_server_that_fails_too_often_raises_an_alarm(
  one, tmp_path, httpserver, monkeypatch
):
  replies = [Response(completion("[2, 1, 3]")), Response("busy", 400)]
  httpserver.expect_request(PATH).respond_with_handler(lambda _: replies.pop(0))
  run = at_server(one, tmp_path / "half", httpserver, monkeypatch, max_failed=0.25)
  run_stage(run, "grpo")
  [line] = small.metrics(run.workdir / "grpo")
  assert (line["failed_queries"], line["failed_above_max"]) == (0.5, 0.25)
  [alarm] = jsonl.read_jsonl(run.workdir / "grpo" / "alarms.jsonl")
  assert (alarm["name"], alarm["step"]) == ("judge", 1)
