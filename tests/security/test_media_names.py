"""Data files of others name videos in their folder only."""

import pytest

from vlmrlaif_jax.core.jsonl import write_records
from vlmrlaif_jax.data.formats.video_files import find_video
from vlmrlaif_jax.data.records import read_preferences, read_records


@pytest.fixture
def folder(tmp_path):
  """A data set with links, next to a file of the user's own."""
  (tmp_path / "own.jpg").touch()
  (tmp_path / "data" / "frames").mkdir(parents=True)
  (tmp_path / "data" / "a.jpg").touch()
  (tmp_path / "data" / "inner.jpg").symlink_to("a.jpg")
  (tmp_path / "data" / "outer.jpg").symlink_to(tmp_path / "own.jpg")
  (tmp_path / "data" / "frames" / "1.jpg").symlink_to("../../own.jpg")
  (tmp_path / "data" / "home").symlink_to(tmp_path)
  return tmp_path / "data"


def read(folder, video, **settings):
  """The reasons why a record and a preference about a video are skipped."""
  row = {"id": "r1", "video": str(video), "question": "Why?", "answer": "So."}
  pair = row | {"output_1": "So.", "output_2": "No.", "preference": 1}
  write_records(folder / "set.jsonl", [row])
  write_records(folder / "pairs.jsonl", [pair])
  _, problems = read_records(folder / "set.jsonl", **settings)
  _, more = read_preferences(folder / "pairs.jsonl", **settings)
  return [problem.reason for problem in problems + more]


OUTSIDE = ["../own.jpg", "{}/../own.jpg", "outer.jpg", "frames", "home/own.jpg"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_the_folder_is_skipped(folder, name):
  reasons = read(folder, name.format(folder))
  assert len(reasons) == 2 and all("data.allow_outside" in x for x in reasons)


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_setting_allows_other_folders(folder, name):
  assert read(folder, name.format(folder), allow_outside=True) == []


@pytest.mark.parametrize("name", ["a.jpg", "{}/a.jpg", "inner.jpg", "frames/../a.jpg"])
def test_absolute_names_and_links_inside_the_folder_are_read(folder, name):
  assert read(folder, name.format(folder)) == []


def test_the_folder_itself_may_be_a_link(folder):
  (folder.parent / "link").symlink_to(folder)
  assert read(folder, "a.jpg", videos=folder.parent / "link") == []


@pytest.mark.parametrize("name", ["../own.jpg", "/etc/hostname", "frames/../../own"])
def test_questions_of_benchmarks_name_videos_in_their_folder(folder, name):
  with pytest.raises(ValueError, match="must be the name of a file in"):
    find_video(folder, name)
