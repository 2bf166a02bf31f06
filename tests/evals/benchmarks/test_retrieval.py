"""Retrieval: files of MSRVTT and MSVD, and ranks worked out by hand."""

import json

import numpy as np
import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import retrieval
from vlmrlaif_jax.evals.text_similarity import Similarity

CAPTIONS = ["one", "two", "three", "four", "five", "six"]
# How alike what is said of each video (a row) is to each caption (a column). Caption
# "one" finds its video first, "two" second, and "six" last: so r1 is 4 of 6, and r5 5.
ALIKE = np.eye(6) + [
  [0, 2, 0, 0, 0, 9],
  [0, 0, 0, 0, 0, 9],
  [0, 0, 0, 0, 0, 9],
  [0, 0, 0, 0, 0, 9],
  [0, 0, 0, 0, 0, 9],
  [0, 0, 0, 0, 0, 0],
]


def settings(path, **more):
  config = retrieval.BENCHMARKS[0].default_config()
  config.update(questions=str(path), videos="videos", **more)
  return config


@pytest.fixture
def msrvtt(tmp_path):
  sentences = [{"video_id": f"video{i}", "caption": c} for i, c in enumerate(CAPTIONS)]
  sentences += [{"video_id": "video0", "caption": "not the first"},
                {"video_id": "video9", "caption": "to train on"}]  # fmt: skip
  videos = [{"video_id": f"video{i}", "split": "test"} for i in range(6)]
  videos += [{"video_id": "video9", "split": "train"}]
  path = tmp_path / "test_videodatainfo.json"
  path.write_text(json.dumps({"sentences": sentences, "videos": videos}))
  return path


def model(rows=ALIKE, said=None, compared=None):
  def of(texts, others):
    if compared is not None:
      compared.extend([list(texts), list(others)])
    return np.array(rows)[: len(texts), : len(others)]

  answer = lambda questions: said or [f"of {q.id}" for q in questions]
  return files.says(answer, similarity=Similarity("scripted", {}, of))


def run(path, **of_model):
  return files.run(retrieval, model(**of_model), files.judge(None), settings(path))


def test_a_caption_looks_among_what_is_said_of_all_videos(msrvtt):
  compared = []
  found = run(msrvtt, compared=compared)
  assert {k: x.mean for k, x in found.values.items()} == {"r1": 4 / 6, "r5": 5 / 6}
  assert compared == [[f"of video{i}" for i in range(6)], CAPTIONS]
  assert [row.values["r1"] for row in found.rows] == [1, 0, 1, 1, 1, 0]
  assert found.rows[0].right == "one" and found.rows[0].video == "videos/video0"


def test_a_video_of_which_nothing_is_said_is_not_there(msrvtt):
  found = run(msrvtt, rows=np.eye(5), said=["a", "b", None, "d", "e", "f"])
  assert found.counts["unanswered"] == 1 and found.values["r1"].n == 5
  assert found.values["r1"].mean == 1 and found.rows[2].values == {}


def test_what_is_said_alike_of_two_videos_ties(msrvtt):
  rows = np.eye(6)
  rows[1] = rows[0] = [1, 1, 0, 0, 0, 0]
  assert run(msrvtt, rows=rows).values["r1"].mean == (0.5 + 0.5 + 4) / 6


def test_msvd_is_read_with_its_names(tmp_path):
  captions, mapping = tmp_path / "sents_test_lc_nopunc.txt", tmp_path / "mapping.txt"
  captions.write_text("vid2\ta dog runs\nvid2\ta dog\nvid1\ta cat, asleep\n")
  mapping.write_text("abc_1_2 vid1\ndef_3_4 vid2\n")
  config = settings(captions, mapping=str(mapping), question="What?")
  items = retrieval.load(config)
  assert [(item.question[:3], item.answer) for item in items] == [
    (("def_3_4", "videos/def_3_4", "What?"), "a dog runs"),
    (("abc_1_2", "videos/abc_1_2", "What?"), "a cat, asleep"),
  ]
  with pytest.raises(FileNotFoundError, match="no file at mapping=''.*MSVD"):
    retrieval.load(settings(captions))
  captions.write_text("vid7\ta dog runs\n")
  with pytest.raises(ValueError, match="line 1: it is not a video of"):
    retrieval.load(config)


def test_other_files_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="no file at .*text-to-video retrieval"):
    retrieval.load(settings(tmp_path / "none.json"))
  path = files.write(tmp_path / "a.json", [])
  with pytest.raises(ValueError, match="is not MSRVTT's"):
    retrieval.load(settings(path))
  files.write(path, {"sentences": [{"video_id": "a"}]})
  with pytest.raises(ValueError, match="sentence 1: it has no video_id or no caption"):
    retrieval.load(settings(path))
  files.write(path, {"sentences": [{"video_id": "a", "caption": "b"}]})
  with pytest.raises(ValueError, match="has 1 videos to choose from"):
    retrieval.load(settings(path))
