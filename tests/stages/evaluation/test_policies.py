"""Benchmarks in the evaluation: files, answers, judgements, recipes on disk."""

import functools
import io
import json

import pytest

from tests.evals import files
from tests.evals.test_clip_similarity import save_text_tower
from tests.helpers import small
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.jsonl import read_jsonl
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.evals.benchmarks import world_files
from vlmrlaif_jax.recipes import runner, validation
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.runtime.answering import VideoReply
from vlmrlaif_jax.stages.evaluation import evaluate, policies
from vlmrlaif_jax.stages.stage import get_stage, load_workdir_policies


@pytest.fixture(scope="module")
def sft(one):
  return load_workdir_policies(one)["sft"]


@pytest.fixture
def begin(one, sft, tmp_path):
  """Runs the stage with settings of its section; returns (its folder, what it said)."""

  def run(names_of=("sft",), **settings):
    config = one.config.copy_and_resolve_references()
    config.evaluate.update(names=("zero_shot_qa",), judge="exact", batch=4)
    config.evaluate.update_from_flattened_dict(
      {key.replace("__", "."): value for key, value in settings.items()}
    )
    made = one._replace(config=config, workdir=tmp_path)
    said, folder = io.StringIO(), tmp_path / "eval"
    with StageLog(folder, "eval", 1, stream=said) as log:
      evaluate.measure_policies(made, dict.fromkeys(names_of, sft), None, folder, log)
    return folder, said.getvalue()

  return run


@pytest.fixture
def asked(one, monkeypatch):
  """Right answers by script; takes up the requests of each call."""
  calls = []
  truths = {(e["video"], e["question"]): e["truth"]["answer"]
            for e in one.splits.benchmark}  # fmt: skip
  for e in one.splits.benchmark:
    told = language.describe_scene(scene.scene_from_json(e["truth"]["scene"]))
    truths |= {(e["video"], question): told for question in world_files.TWICE}

  def reply(run, variables, requests, sampling, *, seed):
    calls.append(requests)
    if requests[0].id.startswith("rate:"):
      return [[VideoReply("{'pred': 'yes', 'score': 3}", True)] for _ in requests]
    return [
      [VideoReply(truths.get((r.video, r.prompt), "It."), True)] for r in requests
    ]

  monkeypatch.setattr(answering, "answer_requests", reply)
  return calls


def told(folder, name="zero_shot_qa"):
  return json.loads((folder / name / "sft" / "scores.json").read_text())


def means(folder, name="zero_shot_qa"):
  return {key: stat["mean"] for key, stat in told(folder, name)["scores"].items()}


def test_a_policy_of_random_weights_is_run_kept_and_not_asked_again(
  begin, one, monkeypatch
):
  folder, _ = begin()
  short = [e for e in one.splits.benchmark if e["truth"]["kind"] != "description"]
  answers = read_jsonl(folder / "zero_shot_qa" / "sft" / "answers.jsonl")[1:]
  assert [row["question"] for row in answers] == [e["question"] for e in short]
  assert told(folder)["counts"]["cases"] == len(short)
  before = told(folder)
  monkeypatch.setattr(answering, "answer_requests", None)
  begin()
  assert told(folder) == before


def test_right_answers_have_full_marks(begin, asked):
  folder, said = begin(names=("videochatgpt", "zero_shot_qa"))
  assert set(means(folder, "videochatgpt").values()) == {5.0}
  assert means(folder) == {"accuracy": 1.0, "score": 5.0}
  assert "zero_shot_qa: mean [95 % interval]" in said


def test_a_choice_is_the_likeliest_option_and_an_answer_that_names_none_is_counted(
  begin, asked, one
):
  by = ("letter", "text", "generation")
  folder, said = begin(
    names=("multiple_choice",), multiple_choice__by=by, prompt_len=160
  )
  count = sum(e["truth"]["kind"] != "description" for e in one.splits.benchmark)
  at = folder / "multiple_choice" / "sft"
  logps = [row["logps"] for row in read_jsonl(at / "by_text.jsonl")[1:]]
  best = [row["values"] for row in read_jsonl(at / "rows.jsonl")[count : 2 * count]]
  rows = json.loads((folder / "world" / "multiple_choice.json").read_text())
  for row, found, values in zip(rows, logps, best, strict=True):
    assert len(found) == len(row["options"]) and max(found) < 0
    right = found.index(max(found)) == "ABCD".index(row["answer"])
    assert values["text_accuracy"] == right
  made = told(folder, "multiple_choice")
  # Of the script, "It.": it does not know these prompts.
  assert made["counts"]["cases"] == 3 * count and made["counts"]["unparsed"] == count
  recipe = made["recipe"]
  assert recipe["judge"]["name"] == "rules" and recipe["settings"]["by"] == [*by]
  assert made["problems"] == [] and "letter_accuracy" in said


def test_what_is_too_long_is_told_of_and_has_no_choice(begin, one, tmp_path):
  limit = one.config.data.prompt_len
  reason = f"none of the 7 questions .*evaluate.prompt_len={limit}, or an"
  with pytest.raises(UserError, match=reason):
    begin(names=("multiple_choice",), multiple_choice__by=("letter",))
  made = told(tmp_path / "eval", "multiple_choice")
  assert made["counts"]["unanswered"] == made["counts"]["cases"] == 7
  assert made["scores"] == {}


def test_recipe_holds_what_moves_scores(begin, asked, one):
  folder, _ = begin(temperature=0.5)
  made = told(folder)["recipe"]
  assert made["frames"] == 3 and made["resolution"] == one.policy.vision.image
  assert made["template"] == "brief" and made["sampling"]["temperature"] == 0.5
  assert made["judge"] == {"name": "exact", "version": "1"}
  assert {"benchmark", "questions", "pooling", "prompts"} <= set(made)


def test_what_goes_by_rules_asks_no_judge(begin, asked):
  folder, _said = begin(names=("chair", "amber"), judge="self")
  found = means(folder, "chair")
  assert (found["chair_s"], found["chair_i"], found["recall"]) == (0, 0, 1)
  assert means(folder, "amber")["odd"] == 1  # "It." is neither yes nor no.
  for name in ("chair", "amber"):
    assert told(folder, name)["recipe"]["judge"] == {"name": "rules"}
    assert not (folder / name / "sft" / "judgements.jsonl").exists()


def test_what_is_said_of_videos_is_compared(begin, asked):
  question = {
    f"{name}__question": language.DESCRIBE_EVENTS for name in ("retrieval", "action")
  }
  folder, _ = begin(names=("retrieval", "action"), similarity="statements", **question)
  assert means(folder, "retrieval") == {"r1": 1, "r5": 1}
  assert means(folder, "action") == {"top1": 1, "top5": 1}
  recipe = told(folder, "action")["recipe"]
  assert recipe["judge"] == {"name": "statements", "version": "1"}
  assert recipe["settings"] == {"question": language.DESCRIBE_EVENTS, "split": 1}


def test_videos_of_a_file_are_found_by_clip(begin, asked, one, tiny_world, tmp_path):
  clip = tmp_path / "clip"
  save_text_tower(clip)
  names = sorted({e["video"].split("videos/")[1] for e in one.splits.benchmark})
  sentences = [{"video_id": name, "caption": f"a {i}"} for i, name in enumerate(names)]
  path = files.write(tmp_path / "videodatainfo.json", {"sentences": sentences})
  given = {"questions": str(path), "videos": str(tiny_world / "videos")}
  folder, _ = begin(
    names=("msrvtt_retrieval",), clip=str(clip),
    **{f"msrvtt_retrieval__{key}": value for key, value in given.items()},
  )  # fmt: skip
  # The script says "It." of each, so that all are as alike to a caption.
  assert means(folder, "msrvtt_retrieval") == {"r1": 1 / len(names), "r5": 1}
  recipe = told(folder, "msrvtt_retrieval")["recipe"]
  assert recipe["judge"]["name"] == "clip" and recipe["judge"]["cut"] == 77
  assert len(recipe["judge"]["version"]) == 16


def test_two_policies_stand_side_by_side_in_one_file(begin, asked):
  folder, said = begin(("sft", "ppo"), names=("chair", "refomb"))
  assert "difference" in said and "+0.0 [+0.0, +0.0]" in said
  found = json.loads((folder / "results.json").read_text())
  assert list(found) == ["chair", "refomb"]
  chair = found["chair"]
  assert chair["pair"] == ["sft", "ppo"]
  assert chair["difference"]["recall"]["mean"] == 0
  assert chair["policies"]["ppo"] == told(folder, "chair")["scores"]
  rows = read_jsonl(folder / "chair" / "sft" / "rows.jsonl")
  rows = [row for row in rows if "recall" in row["values"]]
  above = sum(row["values"]["recall"] * row["weights"]["recall"] for row in rows)
  below = sum(row["weights"]["recall"] for row in rows)
  assert above / below == means(folder, "chair")["recall"]


def test_our_own_judge_goes_by_its_weights_and_sees_the_video(begin, asked):
  folder, _ = begin(judge="self")
  assert means(folder) == {"accuracy": 1.0, "score": 3.0}
  assert len(told(folder)["recipe"]["judge"]["version"]) == 16
  assert all(request.video for request in asked[-1])
  before = len(asked)
  begin(judge="self")
  assert len(asked) == before


def test_a_server_reads_texts_alone(begin, asked, monkeypatch):
  queries = []

  class Server:
    def __init__(self, config, cache):
      pass

    def ask(self, asked):
      queries.extend(asked)
      return ["{'pred': 'no', 'score': 1}"] * len(asked)

  monkeypatch.setattr(policies.endpoint, "Endpoint", Server)
  folder, _ = begin(judge="endpoint", endpoint__model="m-1")
  assert means(folder) == {"accuracy": 0.0, "score": 1.0}
  assert {query.video for query in queries} == {()}
  assert told(folder)["recipe"]["judge"]["version"] == "m-1"


def test_videos_that_cannot_be_read_are_told_by_id_and_not_scored(
  begin, asked, one, tmp_path, tiny_world
):
  about = next(e for e in one.splits.benchmark if e["truth"]["kind"] != "description")
  name = about["video"].split("videos/")[1]
  torn = tiny_world / "videos" / "torn.mp4"
  torn.write_bytes(b"no video")
  row = lambda video, question, said: {
    "video_name": video, "question_id": 1, "question": question, "answer": said
  }  # fmt: skip
  rows = [
    row(name, about["question"], "x"),
    row("torn", "?", "x"),
    row("none", "?", "x"),
  ]
  path = files.write(tmp_path / "qa.json", rows)
  given = {"questions": str(path), "videos": str(tiny_world / "videos")}
  folder, said = begin(
    judge="self", **{f"zero_shot_qa__{key}": value for key, value in given.items()}
  )
  torn.unlink()
  assert told(folder)["counts"] == {
    "cases": 3, "unanswered": 2, "unjudged": 0, "unparsed": 0}  # fmt: skip
  assert [p["id"] for p in told(folder)["problems"]] == ["torn:1", "none:1"]
  assert "torn:1: " in said and "2 of 3 records skipped" in said


def test_a_benchmark_without_an_answer_fails_after_the_others_are_measured(
  begin, asked, tmp_path, tiny_world
):
  row = {"video_name": "none", "question_id": 1, "question": "?", "answer": "x"}
  given = {
    "questions": str(files.write(tmp_path / "qa.json", [row])),
    "videos": str(tiny_world / "videos"),
  }
  with pytest.raises(UserError) as error:
    begin(
      names=("msvd_qa", "zero_shot_qa"),
      **{f"msvd_qa__{key}": value for key, value in given.items()},
    )
  said = str(error.value)
  start = "none of the 1 questions of the benchmark msvd_qa was answered"
  assert said.startswith(f"{start}, for example none:1: ")
  assert "Correct --config.evaluate.msvd_qa, or remove msvd_qa from" in said
  assert means(tmp_path / "eval")["accuracy"] == 1.0


def test_a_bad_row_of_a_file_is_told_of_by_file_and_row(
  begin, asked, one, tmp_path, tiny_world
):
  about = next(e for e in one.splits.benchmark if e["truth"]["kind"] != "description")
  name = about["video"].split("videos/")[1]
  rows = [{"video_name": name, "question": about["question"], "answer": "x"},
          {"video_name": name, "question": "?"}]  # fmt: skip
  folder, said = begin(
    judge="self",
    zero_shot_qa__questions=str(files.write(tmp_path / "qa.json", rows)),
    zero_shot_qa__videos=str(tiny_world / "videos"),
  )
  reason = {"id": "record 2", "reason": 'it has no "answer" or "A"', "file": "qa.json"}
  assert told(folder)["problems"] == [reason]
  assert told(folder)["counts"]["cases"] == 1
  assert "eval: zero_shot_qa: 1 of 2 records skipped:\n  qa.json: record 2: " in said


# Refused before anything is computed.


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"names": ("msvd",)}, "evaluate.names must be .*, not 'msvd'"),
    ({"names": ("msvd_qa",)}, "msvd_qa.questions is empty; zero-shot QA comes"),
    ({"names": (), "judge": "truth"}, "evaluate.judge .*'truth'"),
    ({"names": ("msvd_qa",), "judge": "exact", "msvd_qa__questions": "x.json"},
     "judge=\"exact\" compares words"),
    ({"names": ("videomme",)}, "videomme.questions is empty; Video-MME comes"),
    ({"names": ("multiple_choice",), "multiple_choice__by": ("sum",)},
     "by must be some of"),
    ({"names": ()}, "evaluate.names is empty"),
    ({"names": ("action",), "similarity": "words"}, "evaluate.similarity .*'words'"),
    ({"names": ("action",), "similarity": "statements", "action__questions": "x"},
     "--config.evaluate.similarity=\"statements\""),
    ({"names": ("zero_shot_qa",), "batch": 3}, "evaluate.batch: 3 rows"),
  ],
)  # fmt: skip
def test_what_could_not_be_measured_is_refused(settings, said):
  settings = {f"evaluate__{key}": value for key, value in settings.items()}
  made = small.config({"data.prompt_len": 64}, ("eval",), **settings)
  with pytest.raises(UserError, match=said):
    evaluate.check(made)
    validation.check_batches(made, [get_stage("eval")])


def test_missing_files_are_told_of_before_anything_is_computed(tmp_path):
  made = small.config(
    {}, ("eval",), evaluate__names=("videochatgpt",),
    evaluate__videochatgpt__questions=str(tmp_path),
  )  # fmt: skip
  with pytest.raises(UserError, match="videochatgpt.videos=''"):
    runner.run_recipe(made, str(tmp_path / "run"))
  made.evaluate.names = ("msvd_retrieval",)
  made.evaluate.msvd_retrieval.questions = str(tmp_path)
  with pytest.raises(UserError, match="evaluate.clip=''"):
    runner.run_recipe(made, str(tmp_path / "run"))
  made.evaluate.names = ("videochatgpt",)
  made.evaluate.videochatgpt.videos = str(tmp_path)
  with pytest.raises(UserError, match="videochatgpt.questions=.*generic_qa.json"):
    runner.run_recipe(made, str(tmp_path / "run"))


def test_benchmarks_may_be_added_to_a_workdir(tmp_path):
  config = functools.partial(small.config, {}, ("eval",))
  runner.check_workdir(config(evaluate__names=("videochatgpt",)), tmp_path)
  (tmp_path / "eval").mkdir()
  runner.check_workdir(config(evaluate__names=("zero_shot_qa",)), tmp_path)
  with pytest.raises(UserError, match="evaluate.temperature"):
    runner.check_workdir(config(evaluate__temperature=0.7), tmp_path)
