"""Preferences by divide and conquer, over a policy of random weights."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small
from tests.helpers.stage_runs import run_stage, save, untrained_lora
from tests.methods.roles import noisy
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import merge_params
from vlmrlaif_jax.data import records
from vlmrlaif_jax.feedback import claims
from vlmrlaif_jax.runtime import answering, role_params
from vlmrlaif_jax.stages.labeling import claim_probabilities
from vlmrlaif_jax.stages.labeling import claims as claims_lib
from vlmrlaif_jax.stages.stage import load_workdir_policies
from vlmrlaif_jax.stages.training import dpo
from vlmrlaif_jax.training import checkpoint


def run_of(one, workdir, **settings):
  """The run of `one` in a folder of its own, for a round of two updates."""
  workdir.mkdir()
  shutil.copytree(one.workdir / "sft_long", workdir / "sft_long")
  config = one.config.copy_and_resolve_references()
  config.claims.update(
    samples=4, temperature=1.0, holdout=0.3, batch=4, block=4, check_len=256,
    check_rows=2, balance=False, **settings
  )  # fmt: skip
  config.dpo.update(batch_size=2, steps=2, save_every=1, select="claims")
  config.dpo.optimizer.update(warmup_steps=0, learning_rate=1e-2)
  return one._replace(workdir=workdir, config=config)


def labelled(run, stage="claims_1"):
  folder = run.workdir / stage
  folder.mkdir(exist_ok=True)
  with StageLog(folder, stage, claims_lib.count_blocks(run)) as log:
    return claims_lib.label_claims(run, stage, folder, log)


def by_length(queries):
  """A labeler that denies what is said with an odd number of letters."""
  odd = lambda query: len(query.history[0][1]) % 2
  return [(0.2, 0.7) if odd(query) else (0.9, 0.1) for query in queries]


real_answer = answering.answer_requests


def answer_and_stop(*given, seed):
  """Answers of random weights, which hardly ever come to an end, as if they did."""
  replies = real_answer(*given, seed=seed)
  return [[reply._replace(stopped=True) for reply in said] for said in replies]


@pytest.fixture(scope="module")
def done(one, tmp_path_factory):
  """A round: its run, what its claims told, and what its DPO did."""
  run = run_of(one, tmp_path_factory.mktemp("round") / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      claim_probabilities,
      "compute_yes_no_probs",
      lambda *given, **_: by_length(given[2]),
    )
    patch.setattr(answering, "answer_requests", answer_and_stop)
    rates = labelled(run)
    return run, rates, run_stage(run, "dpo_1")


def rows_of(run, stage="claims_1"):
  return jsonl.read_jsonl(run.workdir / stage / "answers.jsonl")[1:]


def test_every_answer_is_divided_and_scored(done):
  run, rates, _ = done
  rows = rows_of(run)
  assert rates["prompts"] == len(rows) == len(claims_lib.select_round_prompts(run, 1))
  for row in rows:
    assert len(row["answers"]) == 4
    for said, outcome, score in zip(
      row["answers"], row["outcomes"], row["scores"], strict=True
    ):
      parts = {part.strip() for part in said.split(".") if part.strip()}
      assert outcome == ("scored" if parts else "no_claims")
      odd = sum(len(f"{part}.") % 2 for part in parts)
      assert score == (-odd if parts else None)


def test_pairs_prefer_the_answer_of_which_less_is_denied(done):
  run, rates, _ = done
  videos = run.config.data.videos
  path = run.workdir / "claims_1" / "preferences.jsonl"
  pairs, problems = records.read_preferences(path, videos=videos)
  scores = {
    (row["id"], said): score
    for row in rows_of(run)
    for said, score in zip(row["answers"], row["scores"], strict=True)
  }
  assert len(pairs) == rates["pairs"] >= 2 and not problems
  for pair in pairs:
    name = pair["id"].split(":")[0]
    assert scores[name, pair["output_1"]] > scores[name, pair["output_2"]]
    assert "[-]" in pair["judge"]


def test_held_out_prompts_are_of_other_videos(done):
  run, _, _ = done
  videos = lambda examples: {e["video"] for e in examples}
  learned, held = (
    claims_lib.select_round_prompts(run, 1),
    claims_lib.select_held_out_prompts(run),
  )
  assert held and not videos(learned) & videos(held)


def test_rounds_draw_the_prompts_anew(done):
  run, _, _ = done
  run.config.claims.prompts = 2
  names = [
    {e["id"] for e in claims_lib.select_round_prompts(run, n)} for n in (1, 2, 3)
  ]
  run.config.claims.prompts = 600
  assert [len(each) for each in names] == [2, 2, 2]
  assert len(set.union(*names)) > 2


def test_labels_are_not_made_twice_and_not_kept_for_other_weights(
  one, done, tmp_path, monkeypatch
):
  run, rates, _ = done
  again = one._replace(workdir=tmp_path, config=run.config)
  for part in ("sft_long", "claims_1"):
    shutil.copytree(run.workdir / part, tmp_path / part)
  monkeypatch.setattr(
    answering, "answer_requests", lambda *_, **__: pytest.fail("asked again")
  )
  assert labelled(again) == rates
  params = {"policy": noisy(role_params.load_policy(run, "sft_long"), 9, 0.1)}
  shutil.rmtree(tmp_path / "sft_long")
  save(again, "sft_long", params)
  with pytest.raises(pytest.fail.Exception, match="asked again"):
    labelled(again)


def test_dpo_trains_the_policy_and_takes_its_best_checkpoint(done):
  run, _, trained = done
  assert set(trained.state.params) == {"policy"}
  lines = small.metrics(run.workdir / "dpo_1")
  np.testing.assert_allclose(lines[0]["dpo_loss"], np.log(2), rtol=1e-5)
  told = json.loads((run.workdir / "dpo_1" / "selected.json").read_text())
  assert [row["step"] for row in told["of"]] == [0, 1, 2]
  for row in told["of"]:
    accepted = row["claims"] * (1 - row["denied"])
    score = row["score"] * len(claims_lib.select_held_out_prompts(run))
    denied = row["claims"] * row["denied"]
    assert -denied - 1e-6 <= score <= accepted - denied + 1e-6
    assert 0 <= row["right"] <= 1
    shown = run.workdir / "dpo_1" / "samples" / f"step_{row['step']}.jsonl"
    held = [example["id"] for example in claims_lib.select_held_out_prompts(run)][
      : dpo.MAX_LOGGED_ANSWERS
    ]
    assert [json.loads(line)["id"] for line in shown.open()] == held
  assert told["score"] == max(row["score"] for row in told["of"])
  assert trained.summary["selected_step"] == told["step"]


def test_score_counts_accepted_claims_of_right_responses_and_all_denied_ones():
  yes, no = (0.9, 0.1), (0.2, 0.7)
  rows = [{"chances": [each]} for each in ([yes, yes, no], [yes, yes], [no, None], [])]
  assert dpo.score_claims(rows, [True, False, False, True]) == (2 - 1 - 1) / 4
  assert dpo.score_claims(rows, [True] * 4) == (2 + 2 - 1 - 1) / 4


def test_the_start_of_a_round_stays_if_no_checkpoint_is_better(
  done, tmp_path, monkeypatch
):
  run, _, trained = done
  shutil.copytree(run.workdir, tmp_path, dirs_exist_ok=True)
  again = run._replace(workdir=tmp_path)
  scores = iter([0.5, 0.4, 0.3])  # Of the start and of two checkpoints.
  monkeypatch.setattr(dpo, "score_claims", lambda rows, right: next(scores))
  folder = tmp_path / "dpo_1"
  base = role_params.load_policy_variables(again, "sft_long")
  start = jax.tree.map(jnp.asarray, trained.start)
  with StageLog(folder, "dpo_1", 2, resume_from=2) as log:
    summary = dpo.select_checkpoint(again, base, start, folder, log)
  assert summary["selected_step"] == 0
  found = role_params.load_policy(again, "dpo_1")["lora"]
  chex.assert_trees_all_equal(jax.device_get(found), trained.start["policy"]["lora"])


def test_policy_of_a_round_is_the_checkpoint_that_was_taken(done):
  run, _, _ = done
  path = run.workdir / "dpo_1" / "selected.json"
  told, found = json.loads(path.read_text()), {}
  for step in (1, 2):
    path.write_text(json.dumps({**told, "step": step}))
    found[step] = role_params.load_policy(run, "dpo_1")["lora"]
    like = {"policy": {"lora": found[step]}}
    at = str(run.workdir / "dpo_1" / "checkpoints")
    saved = checkpoint.restore_saved_params(at, like, step)["policy"]["lora"]
    chex.assert_trees_all_equal(found[step], saved)
  path.write_text(json.dumps(told))
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(found[1], found[2])


def test_next_round_starts_where_this_one_ended(done):
  run, _, _ = done
  assert (
    role_params.get_start_stage("dpo_2")
    == role_params.get_start_stage("claims_2")
    == "dpo_1"
  )
  assert (
    role_params.get_start_stage("dpo_1")
    == role_params.get_start_stage("dpo")
    == "sft_long"
  )
  params, frozen = role_params.make_policy_roles(run, "dpo_1")
  chex.assert_trees_all_equal(
    params["policy"]["lora"], role_params.load_policy(run, "dpo_1")["lora"]
  )
  chex.assert_trees_all_equal(frozen["ref"]["lora"], params["policy"]["lora"])


# What the reference thinks.


def test_reference_logps_are_kept_for_the_same_weights_and_pairs_alone(done, tmp_path):
  run, _, _ = done
  path = tmp_path / "ref_logps.jsonl"
  source = run.workdir / "claims_1" / "preferences.jsonl"
  pairs, _ = records.read_preferences(source, videos=run.config.data.videos)
  _, frozen = role_params.make_policy_roles(run, "sft_long")
  moved = merge_params(frozen["policy"], noisy(untrained_lora(run), 9, 0.1))
  first = dpo.compute_reference_logps(run, frozen["ref"], pairs, path)
  assert first.shape == (len(pairs), 2) and (first < 0).all()
  mark_rows(path, -7.0)  # So that what is read can be told from what is computed.
  assert (dpo.compute_reference_logps(run, frozen["ref"], pairs, path) == -7.0).all()
  other = dpo.compute_reference_logps(run, moved, pairs, path)
  assert not np.allclose(other, first, atol=1e-4) and not (other == -7.0).any()
  mark_rows(path, -7.0)
  swapped = [{**pair, "preference": 3 - pair["preference"]} for pair in pairs]
  again = dpo.compute_reference_logps(run, moved, swapped, path)
  np.testing.assert_allclose(again, other[:, ::-1], rtol=1e-4)


def mark_rows(path, value):
  head, *rows = jsonl.read_jsonl(path)
  for row in rows:
    del row[jsonl.CHECKSUM]
  marked = [{**row, "logps": [value, value]} for row in rows]
  jsonl.write_records(path, [head, *marked])


# Who divides and who labels.


def test_whole_answers_are_one_claim(one, tmp_path, monkeypatch):
  monkeypatch.setattr(
    claim_probabilities, "compute_yes_no_probs", lambda *given, **_: by_length(given[2])
  )
  run = run_of(one, tmp_path / "run", splitter="whole")
  labelled(run)
  for row in rows_of(run):
    assert [len(said) for said in row["claims"]] == [bool(t) for t in row["answers"]]


@pytest.mark.parametrize("labeler", ["base", "sft"])
def test_labeler_is_the_model_that_was_named(one, tmp_path, monkeypatch, labeler):
  seen = []

  def spy(run, variables, queries, **_):
    seen.append(variables)
    return by_length(queries)

  monkeypatch.setattr(claim_probabilities, "compute_yes_no_probs", spy)
  run = run_of(one, tmp_path / "run", labeler=labeler)
  labelled(run)
  expected = {"base": run.base, "sft": load_workdir_policies(run)["sft"]}[labeler]
  chex.assert_trees_all_equal(seen[0], expected)


def test_a_model_may_divide(one, tmp_path, monkeypatch):
  monkeypatch.setattr(
    claim_probabilities,
    "compute_yes_no_probs",
    lambda *given, **_: [(0.9, 0.1)] * len(given[2]),
  )
  run = run_of(one, tmp_path / "run", splitter="self")
  seen = []
  real = claims.ask_for_claims
  monkeypatch.setattr(
    claims, "ask_for_claims",
    lambda ask, prompts: real(lambda queries: seen.extend(queries) or ask(queries),
                              prompts),
  )  # fmt: skip
  rates = labelled(run)
  assert {query.id.split(":")[0] for query in seen} <= {"split", "turn"} and seen
  assert sum(rates[f"answers_{name}"] for name in claims.CLAIM_OUTCOMES) == 4 * len(
    claims_lib.select_round_prompts(run, 1)
  )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"splitter": "words"}, "splitter .*'words'"),
    ({"labeler": "me"}, "labeler .*'me'"),
    ({"samples": 1}, "samples .* 1"),
  ],
)
def test_settings_without_a_meaning_are_refused(one, settings, message):
  config = one.config.copy_and_resolve_references()
  config.claims.update(settings)
  with pytest.raises(UserError, match=f"--config.claims.{message}"):
    claims_lib.check(config)


# Rates.


def test_rates_are_of_pairs_that_truth_can_tell_apart():
  row = {
    "answers": ["a b", "c", "d e f"], "outcomes": ["scored"] * 3,
    "chances": [[[0.9, 0.1]], [[0.4, 0.5], None], [[0.5, 0.5]]],
    "mistakes": [0, 1, 1], "unsupported": [0, 0, 2],
  }  # fmt: skip
  made = claims_lib.compute_claim_rates(
    [row], [(row, (0, 1)), (row, (2, 0)), (row, (1, 2))]
  )
  assert (made["claims"], made["claims_denied"]) == (3, 2 / 3)
  assert made["claims_unread"] == 1
  assert (made["truth_agreement"], made["truth_pairs"]) == (0.5, 2)
  assert (made["supported_agreement"], made["supported_pairs"]) == (0.5, 2)
  assert (made["chosen_words"], made["rejected_words"]) == (2.0, 2.0)
