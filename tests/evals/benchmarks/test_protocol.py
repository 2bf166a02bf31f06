"""What benchmarks share: files read, scores counted."""

import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import protocol
from vlmrlaif_jax.evals.benchmarks.protocol import ScoredCase
from vlmrlaif_jax.evals.bootstrap import Resampling


def test_scores_are_means_and_what_has_none_is_counted_and_not_zero():
  rows = [
    ScoredCase("a", "v1", {"m": 4.0}), ScoredCase("b", "v1", {"m": 1.0}),
    ScoredCase("c", "v2", {"n": 2.0}), ScoredCase("d", "v2", {}, "unparsed"),
    ScoredCase("e", "v3", {}, "unanswered"),
  ]  # fmt: skip
  found = protocol.average_scores(rows, Resampling())
  assert {name: (x.mean, x.n) for name, x in found.values.items()} == {
    "m": (2.5, 2), "n": (2.0, 1)}  # fmt: skip
  assert found.counts == {"cases": 5, "unanswered": 1, "unjudged": 0, "unparsed": 1}


def test_questions_about_one_video_are_drawn_together():
  rows = [ScoredCase(str(i), "one", {"m": float(i)}) for i in range(5)]
  interval = protocol.average_scores(rows, Resampling()).values["m"]
  assert interval.low == interval.high == interval.mean == 2


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
  found = protocol.find_video(tmp_path, name)
  assert found == str(tmp_path / there.split("/")[0])


def test_a_video_may_lie_in_a_folder_below(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "a.MKV").touch()
  assert protocol.find_video(tmp_path, "b/a.mp4") == str(tmp_path / "b" / "a.MKV")


@pytest.mark.parametrize(
  ("there", "name", "found"),
  [
    (("aB.mp4", "ab.mp4"), "ab", "ab.mp4"),  # YouTube's names differ by case.
    (("aB.mp4", "Ab.mp4"), "ab", "ab"),
    (("a.avi", "a.mp4", "a.gif"), "a", "a.mp4"),
    (("a.avi", "a.MP4", "a.gif"), "a.gif", "a.gif"),
    (("a.json", "a.txt", "._a.mp4", "a.mp4.part"), "a", "a"),
  ],
)
def test_of_several_files_the_right_one_is_found(tmp_path, there, name, found):
  for file in there:
    (tmp_path / file).touch()
  assert protocol.find_video(tmp_path, name) == str(tmp_path / found)


def test_a_video_that_comes_later_is_found(tmp_path):
  assert protocol.find_video(tmp_path, "a") == str(tmp_path / "a")
  (tmp_path / "a.flv").touch()
  assert protocol.find_video(tmp_path, "a") == str(tmp_path / "a.flv")


def test_a_video_that_is_not_there_is_named(tmp_path):
  assert protocol.find_video(tmp_path, "a") == str(tmp_path / "a")


def test_a_file_that_is_not_given_is_not_in_the_hash(tmp_path, monkeypatch):
  chair = protocol.load_benchmarks()["chair"]
  config = chair.default_config()
  config.questions = str(files.write(tmp_path / "chair.json", []))
  found = protocol.hash_benchmark_files(chair, config)
  monkeypatch.chdir(tmp_path)  # What lies in the current folder is none of it.
  assert config.synonyms == "" and protocol.hash_benchmark_files(chair, config) == found


def test_questions_of_a_folder_below_are_in_the_hash(tmp_path):
  (tmp_path / "query").mkdir()
  amber = protocol.load_benchmarks()["amber"]
  made = lambda text: (
    files.write(tmp_path / "query" / "query_all.json", [text]),
    protocol.hash_benchmark_files(amber, files.config(tmp_path)),
  )[1]
  assert made("a") == made("a") != made("b")
