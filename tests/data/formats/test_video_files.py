"""Videos are found by names without a suffix, or with another one."""

import pytest

from vlmrlaif_jax.data.formats.video_files import find_video


@pytest.mark.parametrize(
  ("there", "name"),
  [
    ("a.mp4", "a"), ("a.mp4", "a.mp4"), ("v_a.mkv", "a"), ("a/1.jpg", "a"),
    ("a.MP4", "a"), ("a.gif", "a"), ("a.m4v", "a"), ("a.TS", "a"), ("a.flv", "a"),
    ("a.wmv", "a"), ("a.mpg", "a"), ("a.mkv", "a.mp4"), ("A.mp4", "a.mp4"),
    ("a.mp4", "v_a"), ("v_a.webm", "a.mp4"), ("a.png", "a.jpg"),
    ("a.b.mp4", "a.b"), ("a.mp4", "https://x.org/y/a.mp4?z=1"), ("a/1.jpg", "a.mp4"),
  ],
)  # fmt: skip
def test_videos_are_found_by_name(tmp_path, there, name):
  (tmp_path / there).parent.mkdir(exist_ok=True)
  (tmp_path / there).touch()
  found = find_video(tmp_path, name)
  assert found == str(tmp_path / there.split("/")[0])


def test_a_video_may_lie_in_a_folder_below(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "a.MKV").touch()
  assert find_video(tmp_path, "b/a.mp4") == str(tmp_path / "b" / "a.MKV")


@pytest.mark.parametrize(
  ("there", "name", "found"),
  [
    (("aB.mp4", "ab.mp4"), "ab", "ab.mp4"),  # YouTube's names differ by case.
    (("aB.mp4", "Ab.mp4"), "ab", "ab"),
    (("a.avi", "a.mp4", "a.gif"), "a", "a.mp4"),
    (("a.avi", "a.MP4", "a.gif"), "a.gif", "a.gif"),
    (("a.jpg", "a.json"), "a.mp4", "a.mp4"),  # A thumbnail is not the video.
    (("a.mp4",), "a.jpg", "a.jpg"),
    (("a.json", "a.txt", "._a.mp4", "a.mp4.part"), "a", "a"),
  ],
)
def test_of_several_files_the_right_one_is_found(tmp_path, there, name, found):
  for file in there:
    (tmp_path / file).touch()
  assert find_video(tmp_path, name) == str(tmp_path / found)


def test_a_video_that_comes_later_is_found(tmp_path):
  assert find_video(tmp_path, "a") == str(tmp_path / "a")
  (tmp_path / "a.flv").touch()
  assert find_video(tmp_path, "a") == str(tmp_path / "a.flv")


def test_a_video_that_is_not_there_is_named(tmp_path):
  assert find_video(tmp_path, "a") == str(tmp_path / "a")
