"""Zero-shot QA: accuracy and score of one reply, worked out by hand."""

import pytest

from tests.evals import files
from vlmrlaif_jax.evals.benchmarks import zero_shot_qa


def row(video, number, question, answer):
  return {"video_name": video, "question_id": number, "question": question,
          "answer": answer}  # fmt: skip


@pytest.fixture
def path(tmp_path):
  rows = [row("a", 0, "Who?", "man"), row("a", 1, "What?", "dog"),
          row("b", 2, "Where?", "park"), row("c", 3, "Why?", "fun")]  # fmt: skip
  return files.write(tmp_path / "qa.json", rows)


REPLIES = {
  "man": "{'pred': 'yes', 'score': 5}",
  "dog": "{'pred': 'no', 'score': 2}",
  "park": "{'pred': 'yes', 'score': 4}",
  "fun": "{'pred': 'no', 'score': 0}",
}
SAID = {"Who?": "A man.", "What?": "A cat.", "Where?": "A park.", "Why?": "No."}


def run(path, reply, said=SAID):
  return files.run(
    zero_shot_qa, files.model(said), files.judge(reply), files.config(path)
  )


def test_accuracy_and_score_are_of_one_reply(path):
  found = run(path, lambda case: REPLIES[case.answer])
  assert {k: v.mean for k, v in found.values.items()} == {
    "accuracy": 0.5,
    "score": 2.75,
  }
  assert found.counts == {"cases": 4, "unanswered": 0, "unjudged": 0, "unparsed": 0}


def test_half_a_reply_counts_for_neither(path):
  halves = {"man": "{'pred': 'yes'}", "dog": "{'score': 2}", "park": None}
  found = run(path, lambda case: (REPLIES | halves)[case.answer])
  assert {k: (v.mean, v.n) for k, v in found.values.items()} == {
    "accuracy": (0, 1), "score": (0, 1)}  # fmt: skip
  assert found.counts == {"cases": 4, "unanswered": 0, "unjudged": 1, "unparsed": 2}


def test_a_question_without_an_answer_is_not_scored(path):
  found = run(path, lambda case: REPLIES[case.answer], {"Who?": "A man."})
  assert found.values["accuracy"].mean == 1 and found.counts["unanswered"] == 3


def test_of_an_id_that_stands_twice_the_first_counts(path):
  files.write(path, [row("a", 0, "Who?", "man"), row("a", 0, "What?", "dog")])
  [item] = zero_shot_qa.load(files.config(path), problems := [])
  assert item.answer == "man"
  assert problems == [("record 2", "question_id a:0 is there twice", "qa.json")]


def test_a_missing_file_says_where_to_get_it(tmp_path):
  with pytest.raises(FileNotFoundError, match="MSVD-QA, MSRVTT-QA.*activitynet-qa"):
    zero_shot_qa.load(files.config(tmp_path / "none.json"))


# Files as their sources publish them.


def load(path, videos="videos"):
  return zero_shot_qa.load(files.config(path, videos))


@pytest.mark.parametrize(
  ("published", "there"),
  [
    ({"answer": "someone", "id": 30933, "question": "who?", "video_id": 1301},
     "vid1301.avi"),
    ({"answer": "couch", "category_id": 14, "id": 158581, "question": "what?",
      "video_id": 7010}, "video7010.mp4"),
    ({"video_name": "tumblr_n", "question_id": "3", "question": "what?",
      "answer": "cat"}, "tumblr_n.gif"),
    ({"video_name": "1QI", "question_id": "v_1QI_3", "question": "who?",
      "answer": "yes"}, "v_1QI.mkv"),
    ({"video_name": "v_1QI", "Q": "who?", "A": "yes"}, "v_1QI.mp4"),
  ],
)  # fmt: skip
def test_published_rows_are_read_and_their_videos_found(tmp_path, published, there):
  (tmp_path / there).touch()
  [item] = load(files.write(tmp_path / "qa.json", [published]), tmp_path)
  assert item.question.video == str(tmp_path / there)
  assert item.answer in ("someone", "couch", "cat", "yes")
  assert item.question.text in ("who?", "what?")


def test_tgif_qa_is_a_table_with_tabs(tmp_path):
  path = tmp_path / "Test_frameqa_question.csv"
  head = "gif_name\tquestion\tanswer\tvid_id\tkey\n"
  path.write_text(f"{head}tumblr_n\twhat is it, sir?\tcat\tFRAMEQA1\t7\n")
  [item] = load(path)
  assert item.question[:3] == ("tumblr_n:7", "videos/tumblr_n", "what is it, sir?")


def test_activitynet_qa_has_its_answers_in_a_file_of_their_own(tmp_path):
  asked = [{"video_name": "1QI", "question": "who?", "question_id": f"v_1QI_{i}"}
           for i in range(3)]  # fmt: skip
  path = files.write(tmp_path / "test_q.json", asked)
  with pytest.raises(ValueError, match='it has no "answer"'):
    load(path)
  answers = [{"answer": "yes", "type": 3, "question_id": f"v_1QI_{i}"} for i in (2, 0)]
  files.write(tmp_path / "test_a.json", answers)
  assert [item.question.id for item in load(path)] == ["1QI:v_1QI_0", "1QI:v_1QI_2"]
  files.write(tmp_path / "test_a.json", [{"answer": "yes"}])
  with pytest.raises(ValueError, match="test_a.json must contain a list of records"):
    load(path)


def test_msvd_videos_may_have_the_names_of_youtube(tmp_path):
  (tmp_path / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1301\n")
  (tmp_path / "-4wsuPCjDBc_5_15.avi").touch()
  asked = {"answer": "man", "id": 1, "question": "who?", "video_id": 1301}
  [item] = load(files.write(tmp_path / "qa.json", [asked]), tmp_path)
  assert item.question.video == str(tmp_path / "-4wsuPCjDBc_5_15.avi")


def test_a_row_with_an_empty_cell_is_left_out(tmp_path):
  path = tmp_path / "qa.json"
  path.write_text(
    '[{"video_name": "a", "question": "who?", "answer": NaN},'
    ' {"video_name": "b", "question": "who?", "answer": "man"}]'
  )
  [item] = zero_shot_qa.load(files.config(path), problems := [])
  assert item.question.video == "videos/b"
  assert problems == [("record 1", 'it has no "answer" or "A"', "qa.json")]
