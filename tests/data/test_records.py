"""Records as they come: both spellings, every mistake, nothing lost in silence."""

import json

import pytest

from vlmrlaif_jax.core.jsonl import write_records
from vlmrlaif_jax.data.records import (
  SkippedRecord,
  format_skipped_records,
  order_by_preference,
  read_preferences,
  read_records,
)


@pytest.fixture
def folder(tmp_path):
  """Where two videos lie; the second is two frames."""
  (tmp_path / "frames").mkdir()
  for name in ["a.mp4", "frames/1.jpg", "frames/2.jpg"]:
    (tmp_path / name).touch()
  return tmp_path


def conversation(*texts):
  speakers = ["human", "gpt"] * len(texts)
  return [
    {"from": who, "value": text} for who, text in zip(speakers, texts, strict=False)
  ]


def record(id="r1", **changes):
  good = {
    "id": id,
    "video": "a.mp4",
    "conversations": conversation("<video>\nWhat moves?", "A ball."),
  }
  return {key: x for key, x in {**good, **changes}.items() if x is not None}


def example(folder, **changes):
  return {
    "id": "r1",
    "video": str(folder / "a.mp4"),
    "question": "What moves?",
    "answer": "A ball.",
    "turns": [("What moves?", "A ball.")],
    "source": "set",
  } | changes


def read(folder, *rows, **settings):
  """(examples, problems) of a file of these rows."""
  write_records(folder / "set.jsonl", rows)
  return read_records(folder / "set.jsonl", **settings)


# What is read.


def test_record_becomes_an_example(folder):
  row = record(src_data="anet", truth={"count": 1})
  expected = example(folder, source="anet", truth={"count": 1})
  assert read(folder, row) == ([expected], [])


def test_role_and_content_are_read_like_from_and_value(folder):
  spoken = [
    {"role": "user", "content": "<image>\nWhat moves?"},
    {"role": "assistant", "content": "A ball."},
  ]
  assert read(folder, record(conversations=spoken)) == (
    [example(folder)],
    [],
  )


@pytest.mark.parametrize(
  ("text", "question"),
  [
    ("<image>\nWhat moves?", "What moves?"),
    ("What moves?\n<video>", "What moves?"),
    ("<|vision_start|><|video_pad|><|vision_end|>What moves?", "What moves?"),
    ("Look.\n<video>\nWhat moves?", "Look.\nWhat moves?"),
  ],
)
def test_placeholder_goes_with_its_line(folder, text, question):
  row = record(conversations=conversation(text, "A ball."))
  [found], _ = read(folder, row)
  assert found["question"] == question


def test_all_turns_are_kept_and_the_first_is_the_question(folder):
  row = record(conversations=conversation("<video>\nA?", "a", "B?", "b"))
  [found], _ = read(folder, row)
  assert found["turns"] == [("A?", "a"), ("B?", "b")]
  assert (found["question"], found["answer"]) == ("A?", "a")


@pytest.mark.parametrize(
  ("key", "value", "names"),
  [
    ("video", "frames", "frames"),
    ("image", "a.mp4", "a.mp4"),
    ("images", ["frames/2.jpg", "frames/1.jpg"], ["frames/2.jpg", "frames/1.jpg"]),
    ("video", ["frames/1.jpg"], "frames/1.jpg"),
    ("video", ["a.mp4"], "a.mp4"),
    ("videos", [["frames/1.jpg", "frames/2.jpg"]], ["frames/1.jpg", "frames/2.jpg"]),
    ("video_path", "a.mp4", "a.mp4"),
    ("video_id", "a", "a.mp4"),
    ("video", "a.pkl", "a.mp4"),
    ("video", "a.mp4#t=1.5,3", "a.mp4#t=1.5,3"),
  ],
)
def test_video_goes_by_three_names(folder, key, value, names):
  [found], _ = read(folder, record(video=None) | {key: value})
  if isinstance(names, list):
    assert found["video"] == [str(folder / name) for name in names]
  else:
    assert found["video"] == str(folder / names)


def test_question_needs_no_answer_if_none_is_needed(folder):
  row = record(conversations=conversation("What moves?"))
  [found], problems = read(folder, row, need_answer=False)
  assert (found["answer"], found["turns"], problems) == ("", [("What moves?", "")], [])


def test_uid_stands_in_for_an_id(folder):
  [found], _ = read(folder, record(id=None, uid=0))
  assert found["id"] == "0"


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_both_kinds_of_file_give_the_same(folder, suffix):
  rows = [record("r1"), record("r2")]
  path = folder / f"set.{suffix}"
  if suffix == "json":
    path.write_text(json.dumps(rows, indent=2))
  else:
    write_records(path, rows)
  expected = [example(folder, id=id, source="set") for id in ("r1", "r2")]
  assert read_records(path) == (expected, [])
  assert read_records(path, videos=folder) == (expected, [])


@pytest.mark.parametrize("texts", [("A?", "a"), ("A?", "a", "B?", "b"), ("A?",)])
def test_examples_are_read_back_as_they_were(folder, texts):
  rows = [record(conversations=conversation(*texts), src_data="anet")]
  examples, _ = read(folder, *rows, need_answer=False)
  write_records(folder / "examples.jsonl", examples)
  assert read_records(folder / "examples.jsonl", need_answer=False) == (examples, [])


# What is wrong.

NO_TALK = 'it has no "conversations", "messages", "question" or "prompt" with a text'


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"conversations": None}, NO_TALK),
    ({"conversations": []}, NO_TALK),
    ({"conversations": conversation("A?")}, "it has no answer"),
    ({"conversations": conversation("A?", " \n")}, "turn 2: empty answer"),
    ({"conversations": conversation("A?", "a", "B?")}, "it has no answer"),
    ({"conversations": conversation("A?", "", "B?", "b")}, "turn 2: empty answer"),
    ({"conversations": conversation("<video>\n", "a")}, "turn 1: empty question"),
    ({"conversations": [{"from": "system", "value": "Be."}]}, "it has no question"),
    (
      {"conversations": [{"from": "tool", "value": "3"}]},
      "turn 1: role must be one of ['system', 'human', 'user', 'gpt', 'assistant'], "
      "not 'tool'",
    ),
    (
      {"conversations": [{"from": "gpt", "value": "a"}]},
      "turn 1 is from gpt: human and gpt take turns, human first",
    ),
    (
      {"conversations": conversation("A?")[:1] * 2},
      "turn 2 is from human: human and gpt take turns, human first",
    ),
    ({"conversations": [{"from": "human"}]}, "turn 1 has no text"),
    (
      {"conversations": [{"from": "human", "value": "Red\ud800?"}]},
      "U+D800 at index 3 of a text is not a character (a lone surrogate or a "
      "noncharacter): replace it, for example by U+FFFD",
    ),
    ({"conversations": ["A?"]}, "turn 1 must be an object, not 'A?'"),
    ({"video": None}, 'it has no "video", "images" or "image"'),
    ({"video": 3}, "video must be a path or a list of paths, not 3"),
    ({"truth": "red"}, "\"truth\" must be a dict, not 'red'"),
  ],
)
def test_bad_record_is_left_out_with_its_id_and_reason(folder, changes, reason):
  rows = [record("good"), record("bad", **changes)]
  found, problems = read(folder, *rows)
  assert [one["id"] for one in found] == ["good"]
  assert problems == [SkippedRecord("bad", reason, "set.jsonl")]


def test_missing_video_is_named(folder):
  rows = [record(video="b.mp4"), record("r2", video=["frames/1.jpg", "frames/3.jpg"])]
  assert read(folder, *rows)[1] == [
    SkippedRecord("r1", f"video not found: {folder / 'b.mp4'}", "set.jsonl"),
    SkippedRecord("r2", f"video not found: {folder / 'frames/3.jpg'}", "set.jsonl"),
  ]


def test_records_of_one_id_are_numbered_and_an_equal_one_is_left_out(folder):
  second = record(conversations=conversation("A?", "a"))
  found, problems = read(folder, record(), second, record(), record("r1#2"))
  assert [one["id"] for one in found] == ["r1", "r1#2", "r1#2#2"]
  reason = "it equals an earlier record with the id r1"
  assert problems == [SkippedRecord("r1#3", reason, "set.jsonl")]


@pytest.mark.parametrize(
  ("changes", "name"),
  [
    ({"id": None}, "set.jsonl:1"),
    ({"id": ""}, "set.jsonl:1"),
    ({"id": 1.0}, "1"),
    ({"id": 1.5}, "1.5"),
    ({"id": None, "idx": 3}, "3"),
    ({"id": float("nan"), "question_id": "q"}, "q"),
  ],
)
def test_id_is_text_or_a_number_or_the_place(folder, changes, name):
  [found], _ = read(folder, record() | changes)
  assert found["id"] == name


@pytest.mark.parametrize("id", [True, ["1"], {"a": 1}, "x" * 201, "a\nb", "a\ud800"])
def test_other_ids_are_left_out_by_their_place(folder, id):
  [good], [problem] = read(folder, record("good"), record(id))
  assert good["id"] == "good" and problem.id == "line 2"
  problem.reason.encode()


def test_missing_folder_is_an_error_that_shows_the_layout(folder):
  with pytest.raises(
    FileNotFoundError, match="(?s)nowhere.*expected layout:.*clip.mp4"
  ):
    read(folder, record(), videos=folder / "nowhere")


@pytest.mark.parametrize(
  ("name", "content", "reason"),
  [
    ("a.json", '[{"id": 1},\n {"id" 2}]', "a.json, line 2, column 8: invalid JSON"),
    ("a.json", "", "a.json, line 1, column 1: invalid JSON"),
    ("a.json", '{"id": 1}', "must contain a list of records"),
    ("a.csv", "id,video", "a.csv: the name must be that of a .json, .jsonl"),
  ],
)
def test_unreadable_file_is_an_error_with_its_place(folder, name, content, reason):
  (folder / name).write_text(content)
  with pytest.raises(ValueError, match=reason):
    read_records(folder / name)


def test_bad_lines_are_problems_and_the_rest_is_kept(folder):
  lines = [json.dumps(record()), "", '{"id": "r2",', "[1]"]
  (folder / "a.jsonl").write_text("\n".join(lines))
  found, problems = read_records(folder / "a.jsonl")
  assert [one["id"] for one in found] == ["r1"]
  assert [problem.id for problem in problems] == ["line 3", "line 4"]
  assert problems[0].reason.startswith("invalid JSON at column 1")
  assert problems[1].reason == "a record must be a JSON object, not [1]"


# Preferences.


def preference(folder, **changes):
  return {
    "id": "p1",
    "video": str(folder / "a.mp4"),
    "question": "What moves?",
    "output_1": "A ball.",
    "output_2": "Nothing.",
    "preference": 1,
    "source": "anet",
  } | changes


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"preference": 2, "judge": "Output B.", "flags": {"agreed": False}},
    {"history": [("A?", "a")], "truth": {"count": 1}},
    {"video": ["frames/1.jpg", "frames/2.jpg"]},
  ],
)
def test_preferences_are_read_back_as_they_were(folder, changes):
  written = preference(folder, **changes)
  if isinstance(written["video"], list):
    written["video"] = [str(folder / name) for name in written["video"]]
  write_records(folder / "p.jsonl", [written])
  assert read_preferences(folder / "p.jsonl") == ([written], [])


def test_preference_is_read_in_the_original_form(folder):
  row = {
    "id": "p1",
    "video": "a.mp4",
    "src_data": "anet",
    "conversations": conversation("<image>\nA?", "a", "What moves?", "Nothing."),
    "output_1": {"from": "gpt", "value": "A ball."},
    "output_2": {"from": "gpt", "value": "Nothing."},
    "preference": 2,
  }
  write_records(folder / "p.jsonl", [row])
  expected = preference(folder, preference=2, history=[("A?", "a")])
  assert read_preferences(folder / "p.jsonl") == ([expected], [])


@pytest.mark.parametrize("value", [0, 3, "C", True, None, 1.5, "tie"])
def test_preference_must_be_one_or_two(folder, value):
  rows = [preference(folder, preference=value)]
  write_records(folder / "p.jsonl", rows)
  problem = SkippedRecord("p1", f"preference must be 1 or 2, not {value!r}", "p.jsonl")
  assert read_preferences(folder / "p.jsonl") == ([], [problem])


@pytest.mark.parametrize(
  ("value", "number"),
  [(1, 1), (2.0, 2), ("1", 1), ("B", 2), (" a ", 1), ("output_2", 2)],
)
def test_preference_may_be_written_in_other_ways(folder, value, number):
  write_records(folder / "p.jsonl", [preference(folder, preference=value)])
  [found], _ = read_preferences(folder / "p.jsonl")
  assert found["preference"] == number


@pytest.mark.parametrize(
  ("values", "read"), [((0, 1), []), ((1, 0, 1), []), ((0, 1, 2), ["p1", "p2"])]
)
def test_file_that_counts_from_zero_is_left_out(folder, values, read):
  rows = [preference(folder, id=f"p{i}", preference=v) for i, v in enumerate(values)]
  write_records(folder / "p.jsonl", rows)
  found, problems = read_preferences(folder / "p.jsonl")
  assert [one["id"] for one in found] == read
  assert len(problems) == len(values) - len(read)


@pytest.mark.parametrize("other", ["A ball.", "A  ball.\n"])
def test_identical_answers_are_left_out(folder, other):
  write_records(folder / "p.jsonl", [preference(folder, output_2=other)])
  problem = SkippedRecord("p1", "its two answers are identical", "p.jsonl")
  assert read_preferences(folder / "p.jsonl") == ([], [problem])


def test_several_pairs_of_one_prompt_are_read(folder):
  rows = [preference(folder, output_2=text) for text in ("a", "b", "a")]
  write_records(folder / "p.jsonl", rows)
  found, problems = read_preferences(folder / "p.jsonl")
  assert [one["id"] for one in found] == ["p1", "p1#2"]
  assert [problem.id for problem in problems] == ["p1#3"]


def test_preference_without_an_output_is_left_out(folder):
  write_records(folder / "p.jsonl", [preference(folder, output_2={"value": " "})])
  assert read_preferences(folder / "p.jsonl") == (
    [],
    [SkippedRecord("p1", 'it has no "output_2", or "output_2" is empty', "p.jsonl")],
  )


@pytest.mark.parametrize(
  ("preferred", "expected"),
  [(1, ("A ball.", "Nothing.")), (2, ("Nothing.", "A ball."))],
)
def test_chosen_comes_first(folder, preferred, expected):
  assert order_by_preference(preference(folder, preference=preferred)) == expected


# The report.


def test_report_is_one_block_that_counts_what_it_does_not_show():
  problems = [SkippedRecord(f"r{i}", f"no answer {i}") for i in range(23)]
  head, *lines, last = format_skipped_records(problems, total=200).splitlines()
  assert head == "23 of 200 records skipped:"
  assert lines == [f"  r{i}: no answer {i}" for i in range(20)]
  assert last == "  and 3 more."
  assert format_skipped_records([], total=200) == "0 of 200 records skipped."


def test_a_reason_stands_once_with_the_ids_that_it_is_for():
  problems = [SkippedRecord(f"r{i}", "no answer") for i in range(23)]
  problems.insert(1, SkippedRecord("x", "no video"))
  _, first, second = format_skipped_records(problems, total=200).splitlines()
  ids = ", ".join(f"r{i}" for i in range(20))
  assert first == f"  {ids} and 3 more: no answer" and second == "  x: no video"


def test_report_names_the_file_of_each_reason():
  problems = [SkippedRecord("a", "no answer", f"{i}.json") for i in (1, 2, 1)]
  _, *lines = format_skipped_records(problems, total=9).splitlines()
  assert lines == ["  1.json: a, a: no answer", "  2.json: a: no answer"]


def test_fields_that_no_reader_uses_stay_with_the_example(tmp_path):
  row = {"id": 1, "video": "v.mp4", "question": "A?", "answer": "B", "level": 2}
  (tmp_path / "v.mp4").write_bytes(b"")
  path = tmp_path / "rows.json"
  path.write_text(json.dumps([row | {"rubric": ["short"]}, row | {"id": 2}]))
  (first, second), _ = read_records(path)
  assert first["fields"] == {"level": 2, "rubric": ["short"]}
  assert second["fields"] == {"level": 2}
