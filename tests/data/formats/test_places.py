"""Places of several videos and images in the questions of a record."""

import pytest

from vlmrlaif_jax.core.jsonl import write_records
from vlmrlaif_jax.data.records import read_preferences, read_records
from vlmrlaif_jax.data.templates import MEDIA_MARK as M
from vlmrlaif_jax.data.video import MediaList

FILES = ("a.mp4", "b.mp4", "c.mp4", "1.jpg", "2.jpg")


@pytest.fixture
def folder(tmp_path):
  for name in FILES:
    (tmp_path / name).touch()
  return tmp_path


def read(folder, row):
  write_records(folder / "set.jsonl", [row])
  return read_records(folder / "set.jsonl")


def shorten(folder, video):
  """The names of files, in the form of the record."""
  if isinstance(video, str):
    return video.removeprefix(f"{folder}/")
  if isinstance(video, MediaList):
    return tuple(shorten(folder, each) for each in video.paths)
  return [shorten(folder, each) for each in video]


def talk(*texts):
  names = ("human", "gpt") * len(texts)
  return [{"from": n, "value": text} for n, text in zip(names, texts, strict=False)]


def user(*parts):
  """A message whose texts are those without a dot."""
  kinds = {"mp4": "video", "jpg": "image"}
  make = lambda kind, part: {"type": kind, kind: part}
  content = [make(kinds.get(part.rpartition(".")[2], "text"), part) for part in parts]
  return {"role": "user", "content": content}


REPLY = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
  ("row", "videos", "questions"),
  [
    # Before the first question: no marks.
    ({"videos": ["a.mp4", "b.mp4"], "question": "A?"}, "ab", ["A?"]),
    ({"video": "a.mp4", "image": "1.jpg", "question": "A?"}, "a1", ["A?"]),
    ({"video": ["b.mp4", "a.mp4"], "question": "<video>\n<video>\nA?"}, "ba", ["A?"]),
    (
      {"videos": ["a.mp4"], "images": ["1.jpg", "2.jpg"],
       "conversations": talk("<image><video><image>A?", "x")},
      "1a2", ["A?"],
    ),
    # Within questions, and in later turns.
    (
      {"videos": ["a.mp4", "b.mp4"],
       "conversations": talk("<video>\nA?", "x", "<video>\nB?", "x")},
      "ab", [f"{M}A?", f"{M}B?"],
    ),
    (
      {"videos": ["a.mp4", "b.mp4"], "images": ["1.jpg"],
       "conversations": talk("<video>A?", "x", "See\n<image>\nand <video>.", "x")},
      "a1b", [f"{M}A?", f"See\n{M}\nand {M}."],
    ),
    (
      {"videos": ["a.mp4", "b.mp4"], "images": ["1.jpg"],
       "conversations": talk("<video>A?", "x", "Is <image> in <video> too?", "x")},
      "a1b", [f"{M}A?", f"Is {M} in {M} too?"],
    ),
    (
      {"videos": ["a.mp4", "b.mp4"], "question": "Is <video> like <video>?"},
      "ab", [f"Is {M} like {M}?"],
    ),
    (
      {"videos": ["a.mp4", "b.mp4"],
       "conversations": talk("<video><video>\nIs <video> a tag?", "x")},
      "ab", ["Is <video> a tag?"],
    ),
    # One video in a later turn.
    (
      {"video": "a.mp4", "conversations": talk("A?", "x", "<image>\nB?", "x")},
      "a", ["A?", f"{M}B?"],
    ),
    # Images are frames of one video at one place, and images of their own elsewhere.
    (
      {"images": ["1.jpg", "2.jpg"], "conversations": talk("<image><image>A?", "x")},
      ["1.jpg", "2.jpg"], ["A?"],
    ),
    (
      {"images": ["1.jpg", "2.jpg"],
       "conversations": talk("<image>A?", "x", "<image>B?", "x")},
      "12", [f"{M}A?", f"{M}B?"],
    ),
    (
      {"images": ["1.jpg", "2.jpg"],
       "conversations": talk("Is <image> like <image>?", "x")},
      "12", [f"Is {M} like {M}?"],
    ),
    # Parts of messages: the text around them is that of chat templates.
    (
      {"messages": [user("a.mp4", "A? "), REPLY, user("Is ", "1.jpg", " in it?"),
                    REPLY, user("b.mp4", " C?"), REPLY]},
      "a1b", [f"{M}A?", f"Is {M} in it?", f"{M} C?"],
    ),
    ({"messages": [user("1.jpg", "a.mp4", "A?"), REPLY]}, "1a", ["A?"]),
    (
      {"messages": [{"role": "user", "content": "A?", "videos": ["a.mp4"]}, REPLY,
                    {"role": "user", "content": "B?", "video": "b.mp4"}, REPLY]},
      "ab", [f"{M}A?", f"{M}B?"],
    ),
  ],
)  # fmt: skip
def test_each_placeholder_is_the_place_of_a_video(folder, row, videos, questions):
  [example], _ = read(folder, {"answer": "x"} | row)
  names = {name[0]: name for name in FILES}
  if isinstance(videos, str):
    paths = tuple(names[each] for each in videos)
    videos = paths if len(paths) > 1 else paths[0]
  assert shorten(folder, example["video"]) == videos
  assert [question for question, _ in example["turns"]] == questions


def test_a_list_of_frames_is_one_of_several_videos(folder):
  row = {"videos": [["1.jpg", "2.jpg"], "a.mp4"], "question": "A?", "answer": "x"}
  [example], _ = read(folder, row)
  assert shorten(folder, example["video"]) == (["1.jpg", "2.jpg"], "a.mp4")


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"videos": ["a.mp4", "b.mp4"], "question": "<video>A?"}, "1 placeholder(s), but"),
    ({"video": "a.mp4", "conversations": talk("<video>A?", "x", "<video>B?", "x")},
     "2 placeholders, but it has 1"),
    ({"video": "a.mp4", "image": "1.jpg", "question": "<video><video>A?"},
     "write <video> for each"),
    ({"videos": ["a.mp4", "b.mp4"], "conversations": talk("<video>A?", "x<video>x",
      "<video>", "x")}, "turn 3: empty question"),
  ],
)  # fmt: skip
def test_other_placeholders_are_a_reason(folder, row, reason):
  examples, [problem] = read(folder, {"answer": "x"} | row)
  assert examples == [] and reason in problem.reason


def test_preferences_have_the_places_of_their_history(folder):
  row = {
    "videos": ["a.mp4", "b.mp4"], "chosen": "x", "rejected": "y",
    "messages": [{"role": "user", "content": "<video>A?"}, REPLY,
                 {"role": "user", "content": "B?\n<video>"}],
  }  # fmt: skip
  write_records(folder / "set.jsonl", [row])
  [pair], _ = read_preferences(folder / "set.jsonl")
  assert shorten(folder, pair["video"]) == ("a.mp4", "b.mp4")
  assert pair["history"] == [(f"{M}A?", "x")] and pair["question"] == f"B?\n{M}"
