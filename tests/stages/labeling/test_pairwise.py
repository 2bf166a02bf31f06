"""The label stage: outcomes counted, pairs readable, a killed run made whole."""

import io
import json
import re

import pytest
from ml_collections import ConfigDict

from configs import dpo, front, grm, label, ppo
from tests.feedback.chat_server import Chat
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.data import features, pipeline, prompts, records, tokenization
from vlmrlaif_jax.data.processors.llava import LlavaProcessor
from vlmrlaif_jax.data.templates import MEDIA_MARK
from vlmrlaif_jax.data.video import MediaList
from vlmrlaif_jax.feedback.pairwise_judge import PAIR_OUTCOMES
from vlmrlaif_jax.recipes import validation
from vlmrlaif_jax.report import sources, tables
from vlmrlaif_jax.runtime import loading, role_params
from vlmrlaif_jax.runtime.answering import VideoReply
from vlmrlaif_jax.runtime.run import Run, resolve_checkpoint
from vlmrlaif_jax.stages.labeling import pairwise, preference_rows

RIGHT, WRONG = "It is red.", "It is blue."
# Two answers to each prompt; the scripted judge goes by the words in capitals.
SCRIPT = {
  "kept_1": (f"{RIGHT} BEST", WRONG),
  "kept_2": (WRONG, f"{RIGHT} BEST"),
  "fooled": (RIGHT, f"{WRONG} BEST"),
  "tie": (RIGHT, f"{WRONG} TIE"),
  "biased": (RIGHT, f"{WRONG} BIAS"),
  "mumbled": (RIGHT, f"{WRONG} MUMBLE"),
  "same": (RIGHT, RIGHT),
  "empty": (RIGHT, ""),
  "long_question": None,
  "long_judge": (RIGHT, f"{WRONG} LONG"),
}


def verdict(prompt):
  a, _b = re.search(r"Output A: (.*) Output B: (.*) Which", prompt).groups()
  if "LONG" in prompt:
    return VideoReply("", False, fits=False)
  if "TIE" in prompt:
    return VideoReply(prompts.EQUAL_VERDICT, True)
  if "MUMBLE" in prompt:
    return VideoReply("Mmh.", True)
  side = "A" if "BIAS" in prompt or "BEST" in a else "B"
  return VideoReply(prompts.BETTER_VERDICT.format(side, "more accurate"), True)


def scripted(asked):
  """Stands in for answering.answer; `asked` takes up the requests, call by call."""

  def reply(run, variables, requests, sampling, *, seed):
    asked.append(list(requests))
    return [one(request, sampling) for request in requests]

  def one(request, sampling):
    kind, _, rest = request.id.partition(":")
    if kind == "caption":
      return [VideoReply(f"Seen: {request.start}-{request.stop}.", True)]
    if kind == "judge":
      return [verdict(request.prompt)]
    if SCRIPT[rest] is None:
      return [VideoReply("", False, fits=False)] * sampling.samples
    return [VideoReply(text, True) for text in SCRIPT[rest]]

  return reply


def made_up_run(workdir, **settings):
  """A run over the script's prompts, two to a video, that has no model."""
  folder = workdir / "world" / "videos"
  folder.mkdir(parents=True, exist_ok=True)
  examples = []
  for i, name in enumerate(SCRIPT):
    video = folder / f"v{i // 2}.mp4"
    video.touch()
    right = RIGHT if name == "fooled" else f"{RIGHT} BEST"
    seen = {"scene": {}, "kind": "attribute", "answer": right}
    examples.append({
      "id": name, "video": str(video), "question": "What is it?", "answer": "",
      "source": "test", "turns": [], "truth": seen,
    })  # fmt: skip
  config = ConfigDict(dict(
    seed=0, model=front.model_tiny(), data=front.data_tiny(),
    label=front.label_tiny(),
  ))  # fmt: skip
  config.model.update(frames=5, clip_frames=2)
  config.label.update(block=4, **settings)
  files = {e["video"]: folder / f"{e['video'][-6:-4]}.npy" for e in examples}
  processor = LlavaProcessor(5, 16, 4)
  layouts = dict.fromkeys(files, processor.layout)
  tiny = resolve_checkpoint("builtin:tiny")
  return Run(
    config=config, workdir=workdir, mesh=None, policy=None, reward_model=None,
    base=None, reward_model_base=None, 
    tokenizer=tokenization.load_tokenizer(tiny), stops=(0,),
    template=tokenization.get_template("brief"),
    processor=processor, splits=pipeline.Splits(labels=examples),
    features=features.FeatureStore(files, layouts, {}, {}),
  )  # fmt: skip


def run_stage(run, variables=None):
  folder = run.workdir / "label"
  steps = pairwise.count_label_blocks(run)
  log = StageLog(folder, "label", steps, stream=io.StringIO())
  with pytest.MonkeyPatch.context() as patch, log:
    patch.setattr(role_params, "load_judge", lambda run, name: variables)
    return pairwise.run_label_stage(run, "label", folder, log)


def written(run):
  """What the stage leaves, but for the log."""
  folder = run.workdir / "label"
  names = ["preferences.jsonl", "rates.json", "captions.jsonl", "blocks/*.jsonl"]
  paths = sorted(path for name in names for path in folder.glob(name))
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def scripted_run(tmp_path, monkeypatch):
  """(run, the requests of each call)."""
  asked = []
  monkeypatch.setattr(pairwise.answering, "answer_requests", scripted(asked))
  return made_up_run(tmp_path), asked


def test_every_outcome_is_counted(scripted_run):
  run, _ = scripted_run
  rates = {
    "prompts": 10, "asked": 6, "kept": 3, "tie": 1, "order_inconsistent": 1,
    "unparsable": 1, "identical": 1, "empty": 1, "too_long": 2,
    "truth_agreement": 2 / 3, "truth_pairs": 3,
    # Of eight choices: half of the kept pairs', and both of the biased one.
    "first_chosen": 5 / 8, "chosen_words": 4.0, "rejected_words": 3.0,
  }  # fmt: skip
  assert run_stage(run) == rates
  assert json.loads((run.workdir / "label" / "rates.json").read_text()) == rates


def test_truth_as_the_judge_is_asked_nothing_and_always_right(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(pairwise.answering, "answer_requests", scripted(asked))
  run = made_up_run(tmp_path, judge="truth")
  rates = run_stage(run)
  assert {r.id.split(":")[0] for requests in asked for r in requests} == {"answer"}
  assert (rates["kept"], rates["identical"], rates["too_long"]) == (3, 1, 1)
  assert (rates["tie"], rates["truth_agreement"], rates["truth_pairs"]) == (5, 1.0, 3)
  pairs, problems = records.read_preferences(
    run.workdir / "label" / "preferences.jsonl", videos=run.workdir / "world" / "videos"
  )
  found = [(pair["id"], pair["preference"]) for pair in pairs]
  assert found == [("kept_1", 1), ("kept_2", 2), ("fooled", 1)] and not problems


def test_truth_cannot_judge_what_it_does_not_know(tmp_path, monkeypatch):
  monkeypatch.setattr(pairwise.answering, "answer_requests", scripted([]))
  run = made_up_run(tmp_path, judge="truth")
  for example in run.splits.labels:
    del example["truth"]
  with pytest.raises(UserError, match="kept_1"):
    run_stage(run)


def test_kept_pairs_are_read_as_preferences(scripted_run):
  run, _ = scripted_run
  run_stage(run)
  pairs, problems = records.read_preferences(
    run.workdir / "label" / "preferences.jsonl", videos=run.workdir / "world" / "videos"
  )
  fields = ["id", "output_1", "output_2", "preference"]
  assert problems == []
  assert [[p[name] for name in fields] for p in pairs] == [
    ["kept_1", *SCRIPT["kept_1"], 1],
    ["kept_2", *SCRIPT["kept_2"], 2],
    ["fooled", *SCRIPT["fooled"], 2],
  ]
  videos = {e["id"]: e["video"] for e in run.splits.labels}
  assert [p["video"] for p in pairs] == [videos[p["id"]] for p in pairs]


def test_kept_pair_shows_what_was_said_and_told(scripted_run):
  run, _ = scripted_run
  run_stage(run)
  row = jsonl.read_jsonl(run.workdir / "label" / "preferences.jsonl")[0]
  assert row["video"] == "v0.mp4"
  assert row["agrees_with_truth"] is True
  assert row["narrative"] == "Seen: 0-2. Seen: 2-4. Seen: 4-5."
  assert row["judge_text"] == (
    "Asked as (1, 2): Output A is better because it is more accurate.\n"
    "Asked as (2, 1): Output B is better because it is more accurate."
  )


def test_report_shows_rates_and_pairs(scripted_run):
  run, _ = scripted_run
  run_stage(run)
  [shown] = tables.collect_label_rates(run.workdir, ["label"])
  assert list(shown["outcomes"].values()) == [3, 1, 1, 1]
  assert shown["rates"]["asked"] == 6
  groups, _ = sources.collect_labels(run.workdir / "label")
  # One of each outcome in turn; what was not judged is not shown.
  ids = ["kept_1", "tie", "biased", "mumbled", "kept_2", "fooled"]
  assert [group["id"] for group in groups] == ids
  assert {group["video"] for group in groups} <= {f"v{i}.mp4" for i in range(5)}


def test_pair_of_frame_images_names_its_images(tmp_path):
  row = {"id": "p", "outputs": ["a", "b"], "preference": 1, "verdicts": ["x", "y"],
         "narrative": "", "mistakes": [0, 0], "stopped": [True, True]}  # fmt: skip
  example = {"id": "p", "video": [str(tmp_path / "1.jpg"), "/else/2.jpg"],
             "question": "?", "source": ""}  # fmt: skip
  made = preference_rows.make_preference(example, row, tmp_path, judge_text="")
  assert (made["images"], "video" in made) == (["1.jpg", "/else/2.jpg"], False)


@pytest.mark.parametrize(
  ("videos", "question"),
  [
    (("1.jpg", "2.jpg"), f"Is {MEDIA_MARK} like {MEDIA_MARK}?"),
    (("a.mp4", "1.jpg", ["1.jpg", "2.jpg"]), "Which?"),
    (("a.mp4", "b.mp4"), f"{MEDIA_MARK}Which?\n{MEDIA_MARK}"),
  ],
)
def test_pair_about_several_videos_is_read_again(tmp_path, videos, question):
  for name in ("a.mp4", "b.mp4", "1.jpg", "2.jpg"):
    (tmp_path / name).touch()
  place = lambda x: str(tmp_path / x) if isinstance(x, str) else list(map(place, x))
  row = {"id": "p", "outputs": ["a", "b"], "preference": 1, "verdicts": ["x", "y"],
         "narrative": "", "mistakes": [0, 0], "stopped": [True, True]}  # fmt: skip
  example = {"id": "p", "video": MediaList(tuple(map(place, videos))),
             "question": question, "source": ""}  # fmt: skip
  made = preference_rows.make_preference(example, row, tmp_path, judge_text="")
  assert made["videos"] == list(videos)
  jsonl.write_records(tmp_path / "pairs.jsonl", [made])
  [pair], _ = records.read_preferences(tmp_path / "pairs.jsonl")
  assert pair["video"] == example["video"]
  assert pair["question"] == question


@pytest.mark.parametrize(
  ("preference", "mistakes", "agrees"),
  [
    (1, [0, 2], True),
    (2, [0, 2], False),
    (2, [3, 2], True),
    (1, [1, 1], None),
    (1, [None, None], None),
    (None, [0, 2], None),
  ],
)
def test_truth_has_a_say_only_where_mistakes_differ(preference, mistakes, agrees):
  row = {"preference": preference, "mistakes": mistakes}
  assert preference_rows.is_agreeing_with_truth(row) is agrees


def test_first_two_answers_that_differ_are_compared():
  replies = [VideoReply(text, True) for text in ("a", "a", "b", "c")]
  assert pairwise.select_distinct_pair(replies) == (replies[0], replies[2])
  assert pairwise.select_distinct_pair(replies[:2]) == (replies[0], replies[1])


@pytest.mark.parametrize("lost", ["block_00001", "block_00002"])
def test_killed_run_goes_on_from_the_missing_block(scripted_run, lost):
  run, asked = scripted_run
  run_stage(run)
  whole = written(run)
  asked.clear()
  (run.workdir / "label" / "blocks" / f"{lost}.jsonl").unlink()
  (run.workdir / "label" / "preferences.jsonl").unlink()
  run_stage(run)
  number = int(lost[-1])
  assert [r.id for r in asked[0]] == [
    f"answer:{name}" for name in list(SCRIPT)[4 * number : 4 * number + 4]
  ]
  assert written(run) == whole


def test_resumed_run_logs_all_blocks(scripted_run):
  run, _ = scripted_run
  run_stage(run)
  run_stage(run)
  lines = jsonl.read_jsonl(run.workdir / "label" / "metrics.jsonl")
  assert [line["step"] for line in lines] == [1, 2, 3]
  assert lines[-1]["kept"] == 0.5


def test_blocks_of_another_run_are_refused(scripted_run):
  run, _ = scripted_run
  run_stage(run)
  run.config.label.block = 5
  with pytest.raises(UserError, match="block_00000.jsonl"):
    run_stage(run)


@pytest.mark.parametrize(
  ("mode", "spans"),
  [("none", set()), ("one", {(2, 4)}), ("all", {(0, 2), (2, 4), (4, 5)})],
)
def test_context_says_which_clips_are_captioned(tmp_path, monkeypatch, mode, spans):
  asked = []
  monkeypatch.setattr(pairwise.answering, "answer_requests", scripted(asked))
  run = made_up_run(tmp_path, context=mode)
  run_stage(run)
  captioned = [r for part in asked for r in part if r.id.startswith("caption:")]
  assert {(r.start, r.stop) for r in captioned} == spans
  assert len(captioned) == 5 * len(spans)  # Of 5 videos, which 10 prompts share.


def test_requests_of_one_call_show_as_many_frames(scripted_run):
  run, asked = scripted_run
  run_stage(run)
  lengths = [{(r.stop or 5) - r.start for r in part} for part in asked if part]
  assert {len(each) for each in lengths} == {1}


@pytest.mark.parametrize(
  ("settings", "said"),
  [({"context": "some"}, "context .*'some'"), ({"samples": 1}, "samples .* 1")],
)
def test_bad_settings_are_refused(tmp_path, settings, said):
  run = made_up_run(tmp_path, **settings)
  with pytest.raises(UserError, match=f"--config.label.{said}"):
    pairwise.check(run.config)


def test_captions_that_cannot_be_asked_for_are_an_error(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(pairwise.answering, "answer_requests", scripted(asked))
  with pytest.raises(UserError, match="caption_prompt_len=20: .* video of kept_1"):
    run_stage(made_up_run(tmp_path, caption_prompt_len=20))
  assert asked == []


# With a model: random weights, so that hardly a word is understood.


@pytest.fixture(scope="module")
def tiny_run(tiny_checkpoint, tmp_path_factory):
  config = ConfigDict(dict(
    seed=0, stages=("label",), mesh=dict(data=-1, fsdp=1, tensor=1),
    model=front.model_tiny(), data=front.data_tiny(), label=front.label_tiny(),
  ))  # fmt: skip
  config.model.update(path=str(tiny_checkpoint), frames=4, clip_frames=2, lora_rank=2)
  config.data.update(
    sizes=dict(sft=1, prompts=4, benchmark=1), workers=0, prompt_len=96, response_len=12
  )
  config.label.update(
    batch=4, block=5, judge_prompt_len=512, judge_max_new=6, caption_prompt_len=64,
    caption_max_new=8,
  )  # fmt: skip
  return loading.create_run(
    config, tmp_path_factory.mktemp("tiny"), note=lambda text: None
  )


@pytest.fixture(scope="module")
def labelled(tiny_run):
  return run_stage(tiny_run, tiny_run.base)


def test_random_model_is_not_understood_and_all_is_counted(tiny_run, labelled):
  count = len(tiny_run.splits.prompts)
  assert labelled["prompts"] == sum(labelled[name] for name in PAIR_OUTCOMES) == count
  assert labelled["unparsable"] == labelled["asked"] > 5


def test_model_captions_each_clip_once(tiny_run, labelled):
  rows = jsonl.read_jsonl(tiny_run.workdir / "label" / "captions.jsonl")
  clips = [(row["video"], row["start"], row["stop"]) for row in rows]
  assert len(clips) == len(set(clips)) == 4 * 2


def test_resumed_model_says_what_it_said(tiny_run, labelled):
  whole = written(tiny_run)
  (tiny_run.workdir / "label" / "blocks" / "block_00001.jsonl").unlink()
  (tiny_run.workdir / "label" / "captions.jsonl").unlink()
  run_stage(tiny_run, tiny_run.base)
  again = written(tiny_run)
  del whole["captions.jsonl"], again["captions.jsonl"]
  assert again == whole


def test_a_server_judges_in_place_of_the_model(
  tiny_run, labelled, tmp_path, httpserver, monkeypatch
):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
  chat = Chat(httpserver)
  chat.judge = lambda prompt: "Output A is better because it is first."
  config = tiny_run.config.copy_and_resolve_references()
  config.label.judge = "endpoint"
  config.label.endpoint.update(url=chat.url, model="m", key_env="")
  pairwise.check(config)
  run = tiny_run._replace(config=config, workdir=tmp_path)
  rates = run_stage(run, run.base)
  assert rates["order_inconsistent"] == rates["asked"] == labelled["asked"]
  assert len(chat.requests) == 2 * rates["asked"]
  assert (tmp_path / "endpoint.jsonl").exists()
  seen = chat.requests[0][1]["messages"][0]["content"]
  assert [part["type"] for part in seen].count("image_url") == 8


def test_a_recipe_skips_the_labels_if_all_its_stages_have_preferences(tmp_path):
  config = ppo.get_config()
  assert "label" in validation.list_stages(config)
  config.rm.preferences = str(tmp_path / "pairs.jsonl")
  assert "label" not in validation.list_stages(config)
  both = dpo.get_config()
  both.dpo.preferences = config.rm.preferences
  assert "label" not in validation.list_stages(both)
  judge = grm.get_config()
  judge.rm.preferences = config.rm.preferences
  assert "label" not in validation.list_stages(judge)
  assert "label" in validation.list_stages(label.get_config())
