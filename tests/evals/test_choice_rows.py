"""Questions with options, as each benchmark publishes them."""

import pytest

from vlmrlaif_jax.evals.choice_rows import Choice, add_row_range, read_choice

RED_BLUE = Choice("What?", ("red", "blue"), 1)


def row(options=("A. red", "B. blue"), answer="B", **more):
  return {"question": "What?", "options": list(options), "answer": answer, **more}


@pytest.mark.parametrize(
  "options",
  [
    ("A. red", "B. blue"), (" A. red", "B. blue "), ("(A) red", "(B) blue"),
    ("A: red", "B: blue"), ("A) red", "B) blue"), ("[A] red", "[B] blue"),
    ("A.red", "B.blue"), ("red", "blue"), (" red ", "blue"),
    ("A. red", "B. blue", None), ("red", "blue", float("nan"), ""),
    # Full-width brackets, letters, points, colons and commas.
    ("\uff08A\uff09 red", "\uff08B\uff09 blue"),
    ("\uff21\uff0ered", "\uff22\uff0eblue"),
    ("A\uff1ared", "B\uff1ablue"),
    ("A\u3001red", "B\u3001blue"),
    ("\u3010A\u3011red", "\u3010B\u3011blue"),
  ],
)  # fmt: skip
def test_options_are_texts_without_letters(options):
  assert read_choice(row(options)) == RED_BLUE


@pytest.mark.parametrize(
  "answer",
  ["B", "b", "B.", "(B)", " B ", "\uff08B\uff09", "\uff22", "B. blue", "(B) Blue.",
   "blue", "Blue.", 1, 1.0, "1"],
)  # fmt: skip
@pytest.mark.parametrize("options", [("A. red", "B. blue"), ("red", "blue")])
def test_an_answer_is_a_letter_a_text_or_an_index(answer, options):
  assert read_choice(row(options, answer)) == RED_BLUE


@pytest.mark.parametrize(
  ("options", "answer", "index"),
  [
    (("3", "1", "2"), "2", 2),  # The text of an option, not an index.
    (("3", "1", "2"), 2, 2),
    (("A. 3", "B. 1", "C. 2"), "B", 1),
    (("B", "C", "A"), "A", 2),  # The text, where options have no letters.
    (("A. B", "B. A"), "A", 0),  # The letter, where they have.
    (("U.S. army", "D.C. is shown"), "D.C. is shown", 1),
    (("A man runs", "I think so"), "A man runs", 0),
    (("A. one", "B. one two"), "B. one two", 1),
  ],
)
def test_letters_texts_and_numbers_are_told_apart(options, answer, index):
  assert read_choice(row(options, answer)).answer == index


PUBLISHED = {
  "MVBench": {"video": "a.webm", "question": "What?", "candidates": ["red", "blue"],
              "answer": "blue"},
  "NExT-QA": {"video": "42", "question": "What?", "a0": "red", "a1": "blue",
              "answer": "1", "qid": "0", "type": "CW"},
  "EgoSchema": {"q_uid": "x", "question": "What?", "option 0": "red",
                "option 1": "blue", "answer": 1},
  "EgoSchema of lmms-lab": {"video_idx": "x", "question": "What?",
                            "option": ["A. red", "B. blue"], "answer": "1"},
  "Perception Test": {"video_name": "v", "question": "What?",
                      "options": ["red", "blue"], "answer_id": 1},
  "TempCompass": {"video_id": "v", "question": "What?\nA. red\nB. blue",
                  "answer": "B. blue", "dim": "action"},
  "LongVideoBench": {"video_path": "v.mp4", "question": "What?",
                     "candidates": ["red", "blue"], "correct_choice": 1},
  "MLVU": {"video": "v.mp4", "question": "What?", "candidates": ["red", "blue"],
           "answer": "blue", "duration": 480.2},
  "a table": {"video": "v", "question": "What?", "A": "red", "B": "blue",
              "answer": "B"},
}  # fmt: skip


@pytest.mark.parametrize("row", PUBLISHED.values(), ids=PUBLISHED)
def test_every_published_layout_is_read(row):
  assert read_choice(row) == RED_BLUE


def test_columns_that_are_numbers_are_options_and_their_answer_an_index():
  numbers = {"question": "What?", "a0": "1", "a1": "0", "answer": "1"}
  assert read_choice(numbers) == Choice("What?", ("1", "0"), 1)


def test_the_answer_of_another_file_counts():
  asked = {"question": "What?", "option 0": "red", "option 1": "blue"}
  assert read_choice(asked, 1) == RED_BLUE


@pytest.mark.parametrize(
  ("row", "said"),
  [
    (row(("A. red", "B")), "options must be"),
    (row(("B. red", "A. blue")), "options must be"),
    (row(("A. red", "A. blue")), "options must be"),
    (row(("A. red",)), "two or more options"),
    (row((None, "B. blue")), "an option is empty"),
    (row((["red"], "blue")), "options must be a text"),
    (row(answer="C"), "answer must be one of AB"),
    (row(answer=2), "answer must be one of AB"),
    (row(answer=-1), "answer must be one of AB"),
    (row(answer="A or B"), "answer must be one of AB"),
    (row(answer=["A"]), "answer must be a text"),
    ({"question": "What?", "options": ["red", "blue"]}, 'it has no "answer"'),
    ({"question": "What?", "answer": "A"}, "two or more options"),
    ({"options": ["red", "blue"], "answer": "A"}, 'it has no "question"'),
  ],
)
def test_a_row_of_no_use_says_why(row, said):
  with pytest.raises(ValueError, match=said):
    read_choice(row)


@pytest.mark.parametrize(
  ("row", "name"),
  [
    ({}, "a.mp4"), ({"start": 1.5, "end": 3}, "a.mp4#t=1.5,3"),
    ({"start": "2"}, "a.mp4#t=2"), ({"end": 4.0}, "a.mp4#t=0,4"),
  ],
)  # fmt: skip
def test_limits_name_a_part_of_the_video(row, name):
  assert add_row_range("a.mp4", row) == name


@pytest.mark.parametrize(
  ("row", "said"),
  [({"start": "x"}, "start must be seconds"), ({"start": 3, "end": 2}, "greater")],
)
def test_limits_of_no_use_are_refused(row, said):
  with pytest.raises(ValueError, match=said):
    add_row_range("a.mp4", row)
