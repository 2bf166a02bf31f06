"""Action recognition: files of UCF101 and HMDB51, and ranks worked out by hand."""

import numpy as np
import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import action
from vlmrlaif_jax.evals.text_similarity import Similarity


def settings(path, videos="videos", **more):
  config = action.BENCHMARKS[0].default_config()
  config.update(questions=str(path), videos=str(videos), **more)
  return config


@pytest.fixture
def ucf101(tmp_path):
  path = tmp_path / "testlist01.txt"
  names = ["TaiChi/v_1.avi", "YoYo/v_2.avi", "TaiChi/v_3.avi", "Archery/v_4.avi"]
  path.write_text("\n".join(names))
  return path


def run(path, alike, said=None, compared=None):
  def of(texts, names):
    if compared is not None:
      compared.extend(names)
    return np.array(alike, float)

  answer = lambda questions: said or ["x"] * len(questions)
  model = files.says(answer, similarity=Similarity("scripted", {}, of))
  return files.run(action, model, files.judge(None), settings(path))


def test_the_name_most_alike_is_chosen(ucf101):
  compared = []
  # Columns: Archery, Tai chi, Yo yo. The rows are of Tai chi, Yo yo, Tai chi, Archery.
  found = run(ucf101, [[0, 1, 0], [0, 1, 0], [2, 1, 0], [3, 1, 3]], compared=compared)
  assert compared == ["Archery", "Tai chi", "Yo yo"]
  assert [row.values["top1"] for row in found.rows] == [1, 0, 0, 0.5]
  assert {k: x.mean for k, x in found.values.items()} == {"top1": 1.5 / 4, "top5": 1}
  assert [row.right for row in found.rows][:2] == ["Tai chi", "Yo yo"]


def test_what_has_no_answer_is_counted_and_not_scored(ucf101):
  found = run(ucf101, [[0, 1, 0], [0, 0, 1], [3, 1, 1]], ["x", "x", None, "x"])
  assert found.counts["unanswered"] == 1
  assert (found.values["top1"].mean, found.values["top1"].n) == (1, 3)


def test_hmdb51_is_read_by_split_and_mark(tmp_path):
  lists, videos = tmp_path / "splits", tmp_path / "videos" / "brush_hair"
  lists.mkdir()
  videos.mkdir(parents=True)
  (videos / "a.avi").touch()
  (lists / "brush_hair_test_split1.txt").write_text("a.avi 2 \nb.avi 1 \nc.avi 0 \n")
  (lists / "wave_test_split1.txt").write_text("d.avi 2 \n")
  (lists / "wave_test_split2.txt").write_text("e.avi 2 \n")
  items = action.load(settings(lists, tmp_path / "videos"))
  assert [(i.question.id, i.answer) for i in items] == [
    ("brush_hair/a.avi", "brush hair"), ("wave/d.avi", "wave")]  # fmt: skip
  assert items[0].question.video == str(videos / "a.avi")
  assert items[1].question.video == str(tmp_path / "videos" / "d.avi")


@pytest.mark.parametrize(
  ("named", "words"),
  [("ApplyEyeMakeup", "Apply eye makeup"), ("brush_hair", "brush hair"),
   ("YoYo", "Yo yo"), ("moves_left_and_stays_still", "moves left and stays still")],
)  # fmt: skip
def test_names_are_written_in_words(named, words):
  assert action.split_action_name(named) == words


def test_other_files_are_refused(tmp_path):
  with pytest.raises(
    FileNotFoundError, match="no file or folder at .*action recognition comes"
  ):
    action.load(settings(tmp_path / "none.txt"))
  path = tmp_path / "list.txt"
  path.write_text("a.avi\n")
  with pytest.raises(ValueError, match="list.txt, line 1: it is not ACTION/NAME.avi"):
    action.load(settings(path))
  with pytest.raises(ValueError, match="two or more actions"):
    action.load(settings(tmp_path))
