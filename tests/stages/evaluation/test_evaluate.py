"""The evaluation: numbers made by hand, a whole run, a killed one."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import front
from tests.helpers import small
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.data import features, pipeline, prompts
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.report import page
from vlmrlaif_jax.report import verdict as verdict_lib
from vlmrlaif_jax.runtime import answering, loading, video
from vlmrlaif_jax.runtime.answering import Reply
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.evaluation import evaluate

# Variables of scripted policies.
RIGHT, WRONG = {"w": jnp.ones(1)}, {"w": jnp.zeros(1)}
LONG = "What is it, and what is it, and what is it?"


def run_stage(run, policies, reward=None, stream=None):
  folder = run.workdir / "eval"
  stream = io.StringIO() if stream is None else stream
  with Log(folder, "eval", evaluate.total_steps(run), stream=stream) as log:
    return evaluate.measure_policies(run, policies, reward, folder, log)


def results_of(run):
  return json.loads((run.workdir / "eval" / "results.json").read_text())


# Scripted answers ----------------------------------------------------------------


def benchmark(folder, videos=4):
  """Two questions about each video, and a third that is a user's own."""
  rng = np.random.default_rng(0)
  rows = []
  for i in range(videos):
    seen = scene.sample_scene(rng)
    made = language.questions(seen, rng)["motion"]
    truth = {"scene": scene.to_json(seen), "kind": "motion", "answer": made.answer}
    told = truth | {"kind": "description", "answer": language.describe(seen)}
    happens = language.HAPPENS
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
  """Stands in for answer.answer: RIGHT says what is right, WRONG goes too far.

  The judge likes what is longer. `asked` takes up (variables, ids) of each call.
  """

  def reply(run, variables, requests, sampling, *, seed):
    asked.append((float(variables["w"][0]), [r.id for r in requests]))
    return [[one(run, variables, request)] for request in requests]

  def one(run, variables, request):
    if request.question == LONG:
      return Reply("", False, fits=False)
    if request.id.startswith("judge:"):
      a, b = request.question.split("Output A: ")[1].split(" Output B: ")
      longer = "AB"[len(b.removesuffix(" Which is better?")) > len(a)]
      return Reply(prompts.BETTER.format(longer, "long"), True)
    if request.id.startswith("caption:"):
      return Reply(f"Seen {request.start}-{request.stop}.", True)
    said = right_answer(run, request.id)
    invented = " The small red blob stays still."
    return Reply(said if variables is RIGHT else said + invented, variables is RIGHT)

  return reply


@pytest.fixture
def asked(monkeypatch):
  calls = []
  monkeypatch.setattr(answering, "answer", scripted(calls))
  monkeypatch.setattr(answering, "BATCHES", 1)
  return calls


def made_up_run(workdir, **settings):
  folder = workdir / "world" / "videos"
  rows = benchmark(folder)
  config = ConfigDict(dict(
    seed=0, model=front.model_tiny(), data=front.data_tiny(),
    label=front.label_tiny(), evaluate=evaluate.default_config(),
  ))  # fmt: skip
  config.model.update(frames=6, clip_frames=3)
  config.evaluate.update(batch=5, resamples=200, **settings)
  files = {e["video"]: folder / f"{e['id'][1:]}.npy" for e in rows}
  return Run(
    config=config, workdir=workdir, mesh=None, policy=None, scorer=None, base=None,
    scorer_base=None, tokenizer=None, template=None, eos=0,
    splits=pipeline.Splits(benchmark=rows),
    features=features.Store(files, {}, {}),
  )  # fmt: skip


def test_accuracy_and_hallucination_are_of_truth(tmp_path, asked):
  run = made_up_run(tmp_path)
  summary = run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  policies = results_of(run)["policies"]
  sft = policies["sft"]["accuracy"]
  assert (sft["mean"], sft["n"]) == (0, 8)
  assert policies["ppo"]["accuracy"]["mean"] == 1
  assert policies["ppo"]["hallucination"]["mean"] == 0
  claims = sum(len(language.claims(right_answer(run, f"d{i}"))) for i in range(4))
  # "The small red blob stays still" is of no known form: one claim each time.
  assert policies["sft"]["hallucination"]["mean"] == pytest.approx(4 / (claims + 4))
  assert policies["sft"]["recall"]["mean"] == 1
  assert set(policies["ppo"]["by_kind"]) == {"motion", "reference"}
  assert [policies[name]["stopped"]["mean"] for name in ("sft", "ppo")] == [0, 1]
  assert summary["questions"] == 12 and summary["videos"] == 4
  assert summary["accuracy_difference"] == 1


def test_judge_that_likes_length_drifts_from_truth(tmp_path, asked):
  run = made_up_run(tmp_path)
  run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  found = results_of(run)
  assert found["judge"]["outcomes"] == {"kept": 12} and found["judge"]["asked"] == 12
  assert found["policies"]["ppo"]["judge_score"]["mean"] == 0  # The short answers lose,
  assert found["judge"]["truth_wins"]["mean"] == 1  # and are right
  assert found["judge"]["truth_wins"]["n"] == 8  # wherever a scene is known.
  assert found["judge"]["drift"]["mean"] == -1


def test_the_first_of_the_pair_judges(tmp_path, asked):
  run_stage(made_up_run(tmp_path), {"sft": WRONG, "ppo": RIGHT})
  judges = {w for w, ids in asked if ids[0].startswith("judge:")}
  assert judges == {0.0}


@pytest.mark.parametrize("context, clips", [("none", 0), ("one", 4), ("all", 8)])
def test_judge_is_told_of_the_clips(tmp_path, asked, context, clips):
  run_stage(made_up_run(tmp_path, judge_context=context), {"a": WRONG, "b": RIGHT})
  captions = [i for _, ids in asked for i in ids if i.startswith("caption:")]
  assert len(captions) == len(set(captions)) == clips


def test_all_answers_are_written_before_any_is_judged(tmp_path, asked, monkeypatch):
  run = made_up_run(tmp_path)

  def verdict(example, text):
    names = {path.name for path in (tmp_path / "eval").glob("answers_*.jsonl")}
    assert names == {"answers_sft.jsonl", "answers_ppo.jsonl"}
    raise InterruptedError

  monkeypatch.setattr(evaluate.world_truth, "verdict", verdict)
  with pytest.raises(InterruptedError):
    run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  assert len(jsonl.read_jsonl(tmp_path / "eval" / "answers_ppo.jsonl")) == 1 + 12


def test_changed_policy_is_asked_again_and_no_other(tmp_path, asked):
  run = made_up_run(tmp_path, judge=False)
  run_stage(run, {"sft": WRONG, "ppo": WRONG})
  asked.clear()
  run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  assert [(w, len(ids)) for w, ids in asked] == [(1.0, 5), (1.0, 5), (1.0, 2)]
  assert results_of(run)["policies"]["ppo"]["accuracy"]["mean"] == 1


@pytest.mark.parametrize("change", ["question", "video", "seed", "temperature"])
def test_answers_depend_on_more_than_the_policy(tmp_path, asked, change):
  run = made_up_run(tmp_path)
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


def test_same_policy_twice_differs_by_exactly_nothing(tmp_path, asked):
  run = made_up_run(tmp_path)
  run_stage(run, {"sft": WRONG, "ppo": dict(WRONG)}, lambda rows, texts: [0.3] * 12)
  found = results_of(run)
  kinds = found["difference"].pop("by_kind")
  for stat in [*found["difference"].values(), *kinds.values()]:
    assert (stat["mean"], stat["low"], stat["high"]) == (0, 0, 0)
  assert len(found["difference"]) == 6 and found["judge"]["asked"] == 0


def test_single_policy_has_no_difference(tmp_path, asked):
  run = made_up_run(tmp_path)
  run_stage(run, {"sft": RIGHT})
  assert results_of(run)["difference"] == {"by_kind": {}}
  assert "judge" not in results_of(run)


def test_reward_model_scores_each_policys_answers(tmp_path, asked):
  run = made_up_run(tmp_path)
  reward = lambda examples, texts: np.array(
    [len(t) if "truth" in e else 0.0 for e, t in zip(examples, texts, strict=True)]
  )
  run_stage(run, {"sft": WRONG, "ppo": RIGHT}, reward)
  rows = jsonl.read_jsonl(tmp_path / "eval" / "answers.jsonl")
  assert rows[1]["reward"] == {
    name: float(len(rows[1][name]["text"])) for name in ("sft", "ppo")
  }
  expected = np.mean([row["reward"]["ppo"] for row in rows])
  found = results_of(run)["policies"]["ppo"]["reward"]["mean"]
  assert found == pytest.approx(expected)


def test_question_that_does_not_fit_is_left_out_and_told_of(tmp_path, asked):
  run, said = made_up_run(tmp_path), io.StringIO()
  run.splits.benchmark[3]["question"] = LONG
  summary = run_stage(run, {"sft": WRONG, "ppo": RIGHT}, stream=said)
  assert summary["questions"] == 11
  rows = jsonl.read_jsonl(tmp_path / "eval" / "answers.jsonl")
  assert run.splits.benchmark[3]["id"] not in [row["id"] for row in rows]
  told = "1 of 12 questions are longer than data.prompt_len=56 tokens"
  assert told in said.getvalue()


def test_no_question_that_fits_is_an_error(tmp_path, asked):
  run = made_up_run(tmp_path)
  for example in run.splits.benchmark:
    example["question"] = LONG
  with pytest.raises(UserError, match="12 of 12 questions"):
    run_stage(run, {"sft": WRONG})


def test_answers_are_as_the_report_reads_them(tmp_path, asked):
  run = made_up_run(tmp_path)
  run_stage(run, {"sft": WRONG, "ppo": RIGHT})
  rows = jsonl.read_jsonl(tmp_path / "eval" / "answers.jsonl")
  assert rows[0]["video"] == "v0.mp4" and rows[0]["kind"] == "motion"
  assert [row["truth"] for row in rows[:3]] == [
    right_answer(run, name) for name in ("m0", "d0", "u0")
  ]
  assert rows[1]["sft"]["unsupported"] == ["the small red blob stays still"]
  assert page.outcomes(tmp_path / "eval", "sft", "ppo")["mended"] == 8
  said = verdict_lib.verdict(results_of(run), "sft", "ppo")
  assert said.startswith("PPO 100.0 % [100.0, 100.0] against SFT 0.0 % [0.0, 0.0]")


def test_table_shows_policies_and_difference(tmp_path, asked):
  said = io.StringIO()
  run_stage(made_up_run(tmp_path), {"sft": WRONG, "ppo": RIGHT}, stream=said)
  lines = [" ".join(line.split()) for line in said.getvalue().splitlines()]
  (line,) = (line for line in lines if line.startswith("accuracy"))
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
  run = loading.make(config, tmp_path_factory.mktemp("tiny"), note=lambda text: None)
  llm = jax.tree.map(lambda x: 1.5 * x, run.base["params"]["llm"])
  return run, {"sft": run.base, "ppo": {"params": run.base["params"] | {"llm": llm}}}


@pytest.fixture(scope="module")
def whole(tiny):
  return run_stage(*tiny)


def test_random_model_is_measured(tiny, whole):
  run, _ = tiny
  rows = jsonl.read_jsonl(run.workdir / "eval" / "answers.jsonl")
  assert len(rows) == whole["questions"] == len(run.splits.benchmark) > 8
  assert whole["videos"] == 6 and whole["sft_accuracy"] == 0
  assert any(row["sft"]["text"] != row["ppo"]["text"] for row in rows)
  outcomes = results_of(run)["judge"]["outcomes"]
  assert set(outcomes) <= {"unparsable", "empty"}


def test_killed_evaluation_ends_as_one_that_was_not(tiny, whole, tmp_path, monkeypatch):
  run, policies = tiny
  names = ["answers_sft.jsonl", "answers_ppo.jsonl", "answers.jsonl", "results.json"]
  read = lambda root: {name: (root / "eval" / name).read_bytes() for name in names}
  real, calls = answering.answer, []

  def dies(*args, **kwargs):
    calls.append(1)
    if len(calls) == 5:  # In the midst of the second policy's questions.
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  # Videos are shown by their place in the workdir: the same place, another name.
  again = run._replace(workdir=tmp_path)
  monkeypatch.setattr(answering, "answer", dies)
  monkeypatch.setattr(answering, "BATCHES", 1)
  with pytest.raises(KeyboardInterrupt):
    run_stage(again, policies)
  assert not (tmp_path / "eval" / "results.json").exists()
  monkeypatch.setattr(video, "shown_video", lambda run, e: e["video"].split("/")[-1])
  monkeypatch.setattr(answering, "answer", real)
  run_stage(again, policies)
  killed = read(tmp_path)
  run_stage(run, policies)
  assert killed == read(run.workdir)
