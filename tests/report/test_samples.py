"""What the sample viewer is given: which prompts and answers, no more than fits."""

import json
import math

import pytest
from PIL import Image

from tests.helpers.made_run import answer, block_row, write_lines, write_video
from vlmrlaif_jax.report import samples, sources
from vlmrlaif_jax.report.sources import (
  MAX_ANSWERS,
  MAX_FOLLOWED,
  MAX_OTHERS,
  make_stage_source,
  select_across,
)


def row(id, response="It moves.", score=0.0, **more):
  return {
    "id": id,
    "video": None,
    "kind": None,
    "prompt": f"What of {id}?",
    "response": response,
    "score": score,
    "valid": True,
    "advantage": 0.0,
    "has_stop": True,
    "truth": True,
    **more,
  }


def groups_of(folder, name="ppo"):
  (source,) = make_stage_source(folder, name)
  return source["groups"]


def by_step(groups):
  found = {}
  for group in groups:
    found.setdefault(group["step"], []).append(group["id"])
  return found


def test_spread_takes_from_each_kind_in_turn():
  rows = [{"kind": kind} for kind in "aaabbc"]
  found = select_across(rows, lambda row: row["kind"], 5)
  assert [row["kind"] for row in found] == list("abcab")


def test_prompts_that_stand_in_several_steps_are_followed(tmp_path):
  first = [row(f"p{n}") for n in range(12)]
  own = lambda step: [row(f"s{step}-{n}") for n in range(12)]
  write_lines(tmp_path / "ppo/samples/step_1.jsonl", first)
  for step in (5, 10):
    write_lines(tmp_path / f"ppo/samples/step_{step}.jsonl", own(step) + first)
  groups = groups_of(tmp_path)
  followed = [group for group in groups if group.get("followed")]
  ids = [f"p{n}" for n in range(MAX_FOLLOWED)]
  assert by_step(followed) == {1: ids, 5: ids, 10: ids}
  assert len(groups) == 3 * (MAX_FOLLOWED + MAX_OTHERS)
  # The most telling ones come first, should not all fit.
  assert groups[: len(followed)] == followed


def test_answers_that_were_cut_off_are_shown_before_others(tmp_path):
  rows = [row(f"p{n}", has_stop=n != 7, valid=n != 9) for n in range(12)]
  write_lines(tmp_path / "ppo/samples/step_1.jsonl", rows)
  groups = groups_of(tmp_path)
  assert "p7" in by_step(groups)[1]
  notes = {group["id"]: group["answers"][0]["notes"] for group in groups}
  assert notes["p7"] == ["cut off"]


def test_an_answer_that_was_not_scored_has_no_score(tmp_path):
  rows = [row("p", "It stops.", score=0.0, valid=False), row("p", score=-2.0)]
  write_lines(tmp_path / "grpo/samples/step_1.jsonl", rows)
  (source,) = make_stage_source(tmp_path, "grpo")
  answers = source["groups"][0]["answers"]
  assert [answer["score"] for answer in answers] == [-2.0, None]
  assert answers[1]["notes"] == ["no score: left out of the loss"]
  assert source["means"]["1"]["score"] == -2.0


def test_answers_of_a_prompt_stand_by_score_and_the_same_is_told_once(tmp_path):
  said = [("Left.", 1.0), ("Right.", 3.0), ("Left.", 1.0), ("Up.", None)]
  rows = [row("p", text, score) for text, score in said]
  write_lines(tmp_path / "grpo/samples/step_1.jsonl", rows)
  (group,) = groups_of(tmp_path, "grpo")
  told = [(a["text"], a["score"], a["count"]) for a in group["answers"]]
  assert told == [("Right.", 3.0, 1), ("Left.", 1.0, 2), ("Up.", None, 1)]


def test_of_many_answers_the_best_and_the_worst_are_shown(tmp_path):
  rows = [row("p", f"Answer {n}.", float(n)) for n in range(MAX_ANSWERS + 3)]
  write_lines(tmp_path / "grpo/samples/step_1.jsonl", rows)
  (group,) = groups_of(tmp_path, "grpo")
  scores = [answer["score"] for answer in group["answers"]]
  assert scores == [12, 11, 10, 9, 8, 4, 3, 2, 1, 0] and group["hidden"] == 3


def test_numbers_that_json_does_not_have_are_none(tmp_path):
  terms, raw = {"reward model": 0.1234567}, {"reward model": math.nan}
  rows = [row("p", score=math.nan, kl=math.inf, terms=terms, raw_terms=raw)]
  write_lines(tmp_path / "ppo/samples/step_1.jsonl", rows)
  (group,) = groups_of(tmp_path)
  (found,) = group["answers"]
  assert (found["score"], found["kl"]) == (None, None)
  assert found["terms"] == {"reward model": 0.12346}
  assert found["raw_terms"] == {"reward model": None}
  json.dumps(group, allow_nan=False)


def test_what_the_judge_said_is_of_the_whole_group(tmp_path):
  rows = [row("p", judge=["A or B? → A."]), row("p", "It stops.")]
  write_lines(tmp_path / "grpo/samples/step_1.jsonl", rows)
  (group,) = groups_of(tmp_path, "grpo")
  assert group["judge"] == ["A or B? → A."]


def test_prompts_of_the_most_steps_are_followed(tmp_path):
  twice = [row(f"p{n}") for n in range(MAX_FOLLOWED)]
  for step, rows in enumerate([twice, [*twice, row("q")], [row("q")], [row("q")]]):
    write_lines(tmp_path / f"ppo/samples/step_{step}.jsonl", rows)
  followed = [group for group in groups_of(tmp_path) if group.get("followed")]
  ids = [f"p{n}" for n in range(MAX_FOLLOWED - 1)]
  assert by_step(followed) == {0: ids, 1: [*ids, "q"], 2: ["q"], 3: ["q"]}


def test_means_are_over_the_answers_of_a_step(tmp_path):
  rows = [row("p", score=1.0), row("q", score=2.0)]
  write_lines(tmp_path / "ppo/samples/step_5.jsonl", rows)
  (source,) = make_stage_source(tmp_path, "ppo")
  assert source["means"]["5"]["score"] == 1.5 and source["means"]["5"]["answers"] == 2


def test_pairs_of_every_outcome_are_shown_with_verdicts_and_narrative(tmp_path):
  rows = [block_row(index) for index in range(8)]
  write_lines(tmp_path / "label/blocks/block_00000.jsonl", rows)
  groups = groups_of(tmp_path, "label")
  kinds = [group["kind"] for group in groups]
  assert sorted(set(kinds)) == ["kept", "order_inconsistent", "tie"]  # Judged ones.
  kept = groups[kinds.index("kept")]
  assert [answer["side"] for answer in kept["answers"]] == ["chosen", "rejected"]
  assert kept["judge"][1] == "Answers in the order 2, 1: Output B is better."
  assert kept["narrative"].startswith("A red square crosses")


def claims_row(id):
  return {
    "id": id,
    "video": None,
    "question": "What happens?",
    "answers": ["It is red. It stops.", "It is red."],
    "stopped": [True, False],
    "outcomes": ["scored", "scored"],
    "scores": [-1, 0],
    "claims": [["It is red.", "It stops."], ["It is red."]],
    "chances": [[[0.9, 0.1], [0.2, 0.8]], [None]],
    "mistakes": [1, 0],
    "unsupported": [1, 0],
  }


def test_claims_have_their_verdicts_and_pairs_their_sides(tmp_path):
  write_lines(tmp_path / "claims_2/answers.jsonl", [claims_row("p"), claims_row("q")])
  write_lines(tmp_path / "claims_2/preferences.jsonl", [{"id": "q:1-0"}])
  paired, other = groups_of(tmp_path, "claims_2")
  assert (paired["id"], other["id"], paired["step"]) == ("q", "p", 2)
  best, worst = paired["answers"]
  assert (best["side"], worst["side"]) == ("chosen", "rejected")
  assert best["claims"] == [["It is red.", None]]
  assert worst["claims"] == [["It is red.", True], ["It stops.", False]]


def test_rounds_of_claims_are_one_source(tmp_path):
  for name in ("claims_1", "claims_2"):
    write_lines(tmp_path / name / "answers.jsonl", [claims_row("p")])
  found = samples.collect_viewer(tmp_path, ["claims_1", "dpo_1", "claims_2"])
  (source,) = found["sources"]
  assert source["name"] == "claims" and by_step(source["groups"]) == {
    1: ["p"],
    2: ["p"],
  }


def test_checkpoints_of_dpo_are_steps_of_the_same_prompts(tmp_path):
  for step in (0, 10, 20):
    rows = [claims_row(f"p{n}") for n in range(4)]
    write_lines(tmp_path / f"dpo_1/samples/step_{step}.jsonl", rows)
  groups = groups_of(tmp_path, "dpo_1")
  ids = [f"p{n}" for n in range(4)]
  assert by_step(groups) == {0: ids, 10: ids, 20: ids}
  assert all(group["followed"] for group in groups)


def test_evaluation_shows_what_changed_first_and_the_best_of_n_not_at_all(tmp_path):
  rows = [answer(index) | {"ppo@4": answer(index)["ppo"]} for index in range(40)]
  write_lines(tmp_path / "eval/answers.jsonl", rows)
  groups = groups_of(tmp_path, "eval")
  names = {tuple(a["name"] for a in group["answers"]) for group in groups}
  assert names == {("SFT", "PPO")}
  rights = [tuple(a["right"] for a in group["answers"]) for group in groups]
  assert [len(set(each)) for each in rights] == [2] * 16 + [1] * 8
  assert rights.count((False, True)) == rights.count((True, False)) == 8


# What fits.


def test_groups_are_left_out_when_the_page_is_full_and_counted(tmp_path, monkeypatch):
  rows = [row(f"p{n}", "word " * 200) for n in range(30)]
  write_lines(tmp_path / "ppo/samples/step_1.jsonl", rows)
  write_lines(tmp_path / "eval/answers.jsonl", [answer(n) for n in range(40)])
  monkeypatch.setattr(samples, "MAX_PAGE_BYTES", 6000)
  found = samples.collect_viewer(tmp_path, ["ppo", "eval"])
  size = sum(len(json.dumps(source["groups"])) for source in found["sources"])
  assert 4000 < size + len(json.dumps(found["clips"])) < 7000
  for source, total in zip(found["sources"], (30, 40), strict=True):
    assert source["groups"]  # They are taken in turn.
    assert len(source["groups"]) + source["left_out"] == total


def test_nothing_is_counted_as_left_out_where_all_is_shown(tmp_path):
  write_lines(tmp_path / "ppo/samples/step_1.jsonl", [row("p"), row("q")])
  (source,) = samples.collect_viewer(tmp_path, ["ppo"])["sources"]
  assert source["left_out"] == 0


def test_long_answers_are_cut(tmp_path):
  write_lines(tmp_path / "ppo/samples/step_1.jsonl", [row("p", "a" * 9000)])
  (group,) = groups_of(tmp_path)
  assert group["answers"][0]["text"] == "a" * sources.MAX_ANSWER_CHARS + " …"


# Clips.


def test_a_video_is_decoded_once_and_small(tmp_path):
  write_video(tmp_path / "world/videos/v.mp4", 0, size=256)
  names = ("v.mp4", "none.mp4", "v.mp4", None)
  groups = [{"root": tmp_path, "video": name, "step": 0} for name in names]
  found = samples.fit_sources([{"name": "eval", "groups": groups, "total": 4}])
  assert [each["clip"] for each in found["sources"][0]["groups"]] == [0, 1, 0, None]
  shown, none = found["clips"]
  assert (shown["frames"], shown["width"], shown["height"]) == (12, 80, 80)
  assert len(shown["uri"]) < 20_000 and none == {"error": "no such file: none.mp4"}


def test_a_part_of_a_video_is_a_clip_of_its_own(tmp_path):
  write_video(tmp_path / "world/videos/v.mp4", 0)
  whole, part = (samples.load_clip(tmp_path, f"v.mp4{end}") for end in ("", "#t=0,1"))
  assert part["frames"] == whole["frames"] and part["uri"] != whole["uri"]


@pytest.mark.parametrize(
  ("frame", "size"), [((1280, 720), (142, 80)), ((400, 40), (144, 14))]
)
def test_frames_keep_their_shape(frame, size, tmp_path):
  Image.new("RGB", frame).save(tmp_path / "a.png")
  found = samples.load_clip(tmp_path, str(tmp_path / "a.png"))
  assert (found["width"], found["height"]) == size
