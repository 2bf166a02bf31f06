"""Responses against reference answers."""

import pytest

from vlmrlaif_jax.feedback import answers

QUESTION = "What moves?\nA. red ball\nB. a blue car\nC. 12"


@pytest.mark.parametrize(
  ("response", "answer", "question", "want"),
  [
    ("The dog!", "a dog", "", True),
    ("two dogs", "a dog", "", False),
    ("Twelve", "12", "", True),
    ("1,200", "1200.0", "", True),
    ("50 %", "0.5", "", True),
    (r"\boxed{\frac{3}{4}}", "0.75", "", True),
    ("3/0", "3", "", False),
    ("about 3", "3", "", False),
    ("Yes, there is one.", "yes", "", True),
    ("No.", "Yes", "", False),
    ("<think>No?</think><answer>Yes</answer>", "yes", "", True),
    ("B", "B", QUESTION, True),
    ("The answer is (B).", "a blue car", QUESTION, True),
    ("blue car", "B", QUESTION, True),
    ("red ball", "B. a blue car", QUESTION, False),
    ("A or B", "B", QUESTION, False),
    ("C", "12", QUESTION, True),
    ("(C)", "C", "Which letter?", True),
    ("It is D", "C", "Which letter?", False),
    ("", "dog", "", False),
  ],
)
def test_a_match_is_by_text_number_or_option(response, answer, question, want):
  assert answers.is_match(response, answer, question) == want


def test_a_boxed_match_reads_the_last_box_alone():
  assert answers.is_boxed_match(r"\boxed{1} or \boxed{{2}}", "2") is False
  assert answers.is_boxed_match(r"\boxed{1} or \boxed{2.0}", "2")
  assert not answers.is_boxed_match("2", "2")
  assert answers.extract_boxed(r"\boxed{1 + \boxed{2") is None


def test_f1_counts_shared_words():
  assert answers.compute_f1("a dog runs fast", "The dog runs") == pytest.approx(0.8)
  assert answers.compute_f1("cat", "dog") == 0
  assert answers.compute_f1("the", "a") == 1  # Neither has a word.


def test_options_are_lines_with_letters_in_order():
  assert answers.list_options(QUESTION) == ["red ball", "a blue car", "12"]
  assert answers.list_options("A. one\nC. three") == []
  assert answers.list_options("A. one line only") == []
