"""The evaluation: numbers made by hand, a whole run, a killed one."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import small
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.data import features, pipeline, prompts
from vlmrlaif_jax.data.processors.interface import Grid, Visual
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.feedback import pairwise_judge
from vlmrlaif_jax.feedback.terms.scorer import RewardScores
from vlmrlaif_jax.report import page, tables
from vlmrlaif_jax.report.files import open_report_workdir
from vlmrlaif_jax.runtime import answering, loading, video
from vlmrlaif_jax.runtime.answering import VideoReply
from vlmrlaif_jax.stages.evaluation import evaluate

# Variables of scripted policies.
RIGHT, WRONG = {"w": jnp.ones(1)}, {"w": jnp.zeros(1)}
LONG = "What is it, and what is it, and what is it?"


def run_stage(run, policies, reward=None, stream=None):
  folder = run.workdir / "eval"
  stream = io.StringIO() if stream is None else stream
  with StageLog(folder, "eval", 1, stream=stream) as log:
    return evaluate.measure_policies(run, policies, reward, folder, log)


def scored(score):
  """A reward of one term: a function of the text."""

  def score_all(run, examples, texts, stopped):
    values = np.array([float(score(text)) for text in texts])
    return RewardScores(values, np.isfinite(values), {}, {}, {})

  return score_all


def results_of(run):
  return json.loads((run.workdir / "eval" / "results.json").read_text())["held_out"]


# Scripted answers ----------------------------------------------------------------


def benchmark(folder, videos=4):
  """Two questions about each video, and a third that is a user's own."""
  rng = np.random.default_rng(0)
  rows = []
  for i in range(videos):
    seen = scene.sample_scene(rng)
    made = language.make_questions(seen, rng)["motion"]
    truth = {
      "scene": scene.scene_to_json(seen),
      "kind": "motion",
      "answer": made.answer,
    }
    told = truth | {"kind": "description", "answer": language.describe_scene(seen)}
    happens = language.DESCRIBE_EVENTS
    about = {"video": str(folder / f"v{i}.mp4"), "source": "", "turns": []}
    rows += [
      about | {"id": f"m{i}", "question": made.question, "answer": "", "truth": truth},
      about | {"id": f"d{i}", "question": happens, "answer": "", "truth": told},
      about | {"id": f"u{i}", "question": "Who is it?", "answer": "A cat."},
    ]
  return rows


def right_answer(run, name):
  (example,) = (e for e in run.splits.benchmark if e["id"] == name)
  return example["truth"]["answer"] if "truth" in example else example["answer"]


def scripted(asked):
  """Stands in for answering.answer: RIGHT says what is right, WRONG goes too far.

  The judge likes what is longer. `asked` takes up (variables, ids) of each call.
  """

  def reply(run, variables, requests, sampling, *, seed):
    asked.append((float(variables["w"][0]), [r.id for r in requests]))
    return [[one(run, variables, request)] for request in requests]

  def one(run, variables, request):
    if request.prompt == LONG:
      return VideoReply("", False, fits=False)
    if request.id.startswith("judge:"):
      a, b = request.prompt.split("Output A: ")[1].split(" Output B: ")
      longer = "AB"[len(b.removesuffix(" Which is better?")) > len(a)]
      return VideoReply(prompts.BETTER_VERDICT.format(longer, "long"), True)
    said = right_answer(run, request.id)
    invented = " The small red blob stays still."
    return VideoReply(
      said if variables is RIGHT else said + invented, variables is RIGHT
    )

  return reply


@pytest.fixture
def asked(monkeypatch):
  calls = []
  monkeypatch.setattr(answering, "answer_requests", scripted(calls))
  monkeypatch.setattr(answering, "BATCHES", 1)
  return calls


@pytest.fixture
def run_of(one, tmp_path):
  """Makes a run of made-up questions about videos that do not exist."""

  def make(**settings):
    return made_up_run(one, tmp_path, **settings)

  return make


def made_up_run(one, workdir, **settings):
  folder = workdir / "world" / "videos"
  rows = benchmark(folder)
  config = one.config.copy_and_resolve_references()
  config.evaluate.update(batch=5, resamples=200)
  config.evaluate.held_out.update(settings)
  files = {e["video"]: folder / f"{e['id'][1:]}.npy" for e in rows}
  layouts = dict.fromkeys(files, Visual(Grid(3, 4, 4)))
  return one._replace(
    config=config,
    workdir=workdir,
    splits=pipeline.Splits(benchmark=rows),
    features=features.FeatureStore(files, layouts, {}, {}),
  )


def details(run, policy):
  rows = jsonl.read_jsonl(run.workdir / "eval" / "held_out" / policy / "rows.jsonl")
  return [row["details"] for row in rows]


def test_accuracy_and_hallucination_are_of_truth(run_of, tmp_path, asked):
  run = run_of()
  summary = run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  policies = results_of(run)["policies"]
  sft = policies["sft"]["accuracy"]
  assert (sft["mean"], sft["n"]) == (0, 8)
  assert policies["ppo"]["accuracy"]["mean"] == 1
  assert policies["ppo"]["hallucination"]["mean"] == 0
  claims = sum(len(language.split_claims(right_answer(run, f"d{i}"))) for i in range(4))
  # "The small red blob stays still" is of no known form: one claim each time.
  assert policies["sft"]["hallucination"]["mean"] == pytest.approx(4 / (claims + 4))
  assert policies["sft"]["recall"]["mean"] == 1
  kinds = {name for name in policies["ppo"] if name.endswith(".accuracy")}
  assert kinds == {"motion.accuracy", "reference.accuracy"}
  assert [policies[name]["stopped"]["mean"] for name in ("sft", "ppo")] == [0, 1]
  found = results_of(run)
  assert found["questions"] == 12 and found["videos"] == 4
  assert found["difference"]["accuracy"]["mean"] == 1
  assert summary["held_out.ppo.accuracy"] == 1


def test_judge_that_likes_length_drifts_from_truth(run_of, tmp_path, asked):
  run = run_of()
  run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  found = results_of(run)
  assert [each["judgement"] for each in details(run, "ppo")] == ["kept"] * 12
  ppo = found["policies"]["ppo"]
  assert ppo["judge_score"]["mean"] == 0  # The short answers lose,
  assert ppo["truth_score"]["mean"] == 1  # and are right
  assert ppo["truth_score"]["n"] == 8  # wherever a scene is known.
  assert ppo["judge_drift"]["mean"] == -1
  assert found["difference"]["judge_score"]["mean"] == -1


def test_the_first_of_the_pair_judges(run_of, tmp_path, asked):
  run_stage(run_of(), {"sft": WRONG, "ppo": RIGHT})
  judges = {w for w, ids in asked if ids[0].startswith("judge:")}
  assert judges == {0.0}


def test_both_answers_are_written_before_the_judge_compares_them(
  run_of, tmp_path, asked, monkeypatch
):
  def judge_pairs(pairs, ask, prompts):
    names = {
      path.parent.name for path in tmp_path.glob("eval/held_out/*/answers.jsonl")
    }
    assert names == {"sft", "ppo"} and len(pairs) == 12
    raise InterruptedError

  monkeypatch.setattr(pairwise_judge, "judge_pairs", judge_pairs)
  with pytest.raises(InterruptedError):
    run_stage(run_of(), {"sft": WRONG, "ppo": RIGHT})
  path = tmp_path / "eval" / "held_out" / "ppo" / "answers.jsonl"
  assert len(jsonl.read_jsonl(path)) == 1 + 12


def test_verdicts_are_not_asked_for_again(run_of, tmp_path, asked):
  run = run_of()
  run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  before = results_of(run)
  asked.clear()
  run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  assert not asked and results_of(run) == before


def test_changed_policy_is_asked_again_and_no_other(run_of, tmp_path, asked):
  run = run_of(judge=False)
  run_stage(run, {"sft": WRONG, "ppo": WRONG})
  asked.clear()
  run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  assert [(w, len(ids)) for w, ids in asked] == [(1.0, 5), (1.0, 5), (1.0, 2)]
  assert results_of(run)["policies"]["ppo"]["accuracy"]["mean"] == 1


@pytest.mark.parametrize("change", ["question", "video", "seed", "temperature"])
def test_answers_depend_on_more_than_the_policy(run_of, tmp_path, asked, change):
  run = run_of()
  run_stage(run, {"sft": RIGHT})
  asked.clear()
  example = run.splits.benchmark[0]
  if change == "question":
    example["question"] += "?"
  elif change == "video":
    run.features.files[example["video"]] = tmp_path / "another.npy"
  elif change == "seed":
    run.config.seed = 1
  else:
    run.config.evaluate.temperature = 0.5
  run_stage(run, {"sft": RIGHT})
  assert len(asked) == 3


def test_same_policy_twice_differs_by_exactly_nothing(run_of, tmp_path, asked):
  run = run_of()
  reward = scored(lambda text: 0.3)
  run_stage(run, {"sft": WRONG, "ppo": dict(WRONG)}, reward)
  found = results_of(run)["difference"]
  for stat in found.values():
    assert (stat["mean"], stat["low"], stat["high"]) == (0, 0, 0)
  assert len(found) == 11 and "judge_score" not in found


def test_single_policy_has_no_difference(run_of, tmp_path, asked):
  run = run_of()
  run_stage(run, {"sft": RIGHT})
  found = results_of(run)
  assert found["difference"] == {} and "judge_score" not in found["policies"]["sft"]


def test_reward_model_scores_each_policys_answers(run_of, tmp_path, asked):
  run = run_of()
  reward = scored(len)
  run_stage(run, {"sft": WRONG, "ppo": RIGHT}, reward)
  rows = jsonl.read_jsonl(tmp_path / "eval" / "answers.jsonl")
  assert rows[1]["reward"] == {
    name: float(len(rows[1][name]["text"])) for name in ("sft", "ppo")
  }
  expected = np.mean([row["reward"]["ppo"] for row in rows])
  found = results_of(run)["policies"]["ppo"]["reward"]["mean"]
  assert found == pytest.approx(expected)


def test_a_reward_that_no_answer_has_is_explained(run_of, tmp_path, asked):
  def score_none(run, examples, texts, stopped):
    invalid = np.full(len(texts), np.nan)
    return RewardScores(invalid, np.isfinite(invalid), {}, {}, {"rank": "Because.\n"})

  run, said = run_of(), io.StringIO()
  run_stage(run, {"sft": WRONG}, score_none, stream=said)
  assert "eval: no answer has a reward: rank: Because." in said.getvalue()
  assert "reward" not in results_of(run)["policies"]["sft"]


def test_question_that_does_not_fit_is_left_out_and_told_of(run_of, tmp_path, asked):
  run, said = run_of(), io.StringIO()
  run.splits.benchmark[3]["question"] = LONG
  run_stage(run, {"sft": WRONG, "ppo": RIGHT}, stream=said)
  assert results_of(run)["questions"] == 11
  rows = jsonl.read_jsonl(tmp_path / "eval" / "answers.jsonl")
  assert run.splits.benchmark[3]["id"] not in [row["id"] for row in rows]
  assert f"{run.splits.benchmark[3]['id']}: longer than evaluate.prompt_len" in (
    said.getvalue()
  )


def test_no_question_that_fits_is_an_error(run_of, tmp_path, asked):
  run = run_of()
  for example in run.splits.benchmark:
    example["question"] = LONG
  with pytest.raises(UserError, match="none of the 12 held-out questions"):
    run_stage(run, {"sft": WRONG})


def test_answers_are_as_the_report_reads_them(run_of, tmp_path, asked):
  run = run_of()
  run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  rows = jsonl.read_jsonl(tmp_path / "eval" / "answers.jsonl")
  assert rows[0]["video"] == "v0.mp4" and rows[0]["kind"] == "motion"
  assert [row["truth"] for row in rows[:3]] == [
    right_answer(run, name) for name in ("m0", "d0", "u0")
  ]
  assert rows[1]["sft"]["unsupported"] == ["the small red blob stays still"]
  shown = open_report_workdir(tmp_path, "eval")
  assert page.count_outcomes(shown)["corrected"] == 8
  said = tables.format_verdict(shown)
  assert said.startswith("Mean over kinds, held-out questions: PPO 100.0 %")


def test_table_shows_policies_and_difference(run_of, tmp_path, asked):
  said = io.StringIO()
  run_stage(run_of(), {"sft": WRONG, "ppo": RIGHT}, stream=said)
  lines = [" ".join(line.split()) for line in said.getvalue().splitlines()]
  (line,) = (line for line in lines if line.startswith("accuracy"))
  assert any(line.startswith("motion.accuracy") for line in lines)
  assert line == (
    "accuracy 0.0 [0.0, 0.0] 100.0 [100.0, 100.0] +100.0 [+100.0, +100.0] 8"
  )


# A real model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_settings, tmp_path_factory):
  """(a run over six videos with a random model, two policies)."""
  config = small.config(
    tiny_settings, stages=("eval",), data__benchmark=tiny_settings["data.records"],
    data__response_len=8, evaluate__resamples=100, label__judge_prompt_len=256,
    label__judge_max_new=3,
  )  # fmt: skip
  run = loading.create_run(
    config, tmp_path_factory.mktemp("tiny"), note=lambda text: None
  )
  llm = jax.tree.map(lambda x: 1.5 * x, run.base["params"]["llm"])
  return run, {"sft": run.base, "ppo": {"params": run.base["params"] | {"llm": llm}}}


@pytest.fixture(scope="module")
def whole(tiny):
  return run_stage(*tiny)


def test_random_model_is_measured(tiny, whole):
  run, _ = tiny
  rows = jsonl.read_jsonl(run.workdir / "eval" / "answers.jsonl")
  found = results_of(run)
  assert len(rows) == found["questions"] == len(run.splits.benchmark) > 8
  assert found["videos"] == 6 and whole["held_out.sft.accuracy"] == 0
  assert any(row["sft"]["text"] != row["ppo"]["text"] for row in rows)
  outcomes = {each.get("judgement") for each in details(run, "ppo")}
  assert outcomes <= {"unparsable", "empty", None}


def test_killed_evaluation_ends_as_one_that_was_not(tiny, whole, tmp_path, monkeypatch):
  run, policies = tiny
  names = [f"held_out/{policy}/answers.jsonl" for policy in policies]
  names += ["answers.jsonl", "results.json"]
  read = lambda root: {name: (root / "eval" / name).read_bytes() for name in names}
  real, calls = answering.answer_requests, []

  def dies(*args, **kwargs):
    calls.append(1)
    if len(calls) == 5:  # In the midst of the second policy's questions.
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  # Videos are shown by their place in the workdir: the same place, another name.
  again = run._replace(workdir=tmp_path)
  monkeypatch.setattr(answering, "answer_requests", dies)
  monkeypatch.setattr(answering, "BATCHES", 1)
  with pytest.raises(KeyboardInterrupt):
    run_stage(again, policies)
  assert not (tmp_path / "eval" / "results.json").exists()
  monkeypatch.setattr(
    video, "get_report_path", lambda run, e: e["video"].split("/")[-1]
  )
  monkeypatch.setattr(answering, "answer_requests", real)
  run_stage(again, policies)
  killed = read(tmp_path)
  run_stage(run, policies)
  assert killed == read(run.workdir)
