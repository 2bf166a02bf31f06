"""What benchmarks share: files read, scores counted."""

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
