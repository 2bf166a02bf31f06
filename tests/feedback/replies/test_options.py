"""Tables of yes or no and of options with their right reading."""

import pytest

from vlmrlaif_jax.feedback.replies.options import parse_choice, parse_yes_no

# Full-width characters are escapes: \uff21 is A, \uff08 a bracket, \uff1a a colon.

YES_NO = [
  ("Yes.", True),
  ("yes, there is no red ball", True),
  (" NO", False),
  ('"No."', False),
  ("**No**, it is red", False),
  ("No dog is visible.", False),
  ("Answer: Yes", True),
  ("The answer is no.", False),
  ("**Answer\uff1a** No", False),
  ('{"pred": "yes", "score": 4}', True),
  ("{'pred': 'No', 'score': 1}", False),
  ("\\boxed{Yes}", True),
  ("<think>Yes?</think>No.", False),
  ("Well, yes.", True),
  ("I think yes.", True),
  ("\uff39es", True),
  ("是的\uff0c有一只狗。", True),
  ("不是", False),
  ("否", False),
  ("是", True),
  ("None of the balls moves.", None),
  ("Nothing moves.", None),
  ("Notably, it moves.", None),
  ("Not sure", None),
  ("Yesterday it moved.", None),
  ("Yes and no", None),
  ("Yes or no?", None),
  ("Yes/No", None),
  ("No. 5 is on the shirt.", None),
  ("No one is there.", None),
  ("No idea.", None),
  ("Know", None),
  ("It does, yes.", None),
  ("是否有狗", None),
  ("{'pred': 'yes'}, {'pred': 'no'}", None),
  ("<think>Yes", None),
  ("", None),
  # Written before the parser read them.
  ("Yes, it does.", True),
  ("No, I don't see a dog.", False),
  ("Answer: **No**.", False),
  ("I would say no.", False),
  ("Of course not.", None),
  ("There is no dog.", None),
  ("Nope.", False),
  ("{\"answer\": \"yes\", \"reason\": \"no doubt\"}", True),
  ("没有", None),
  ("Noah is there.", None),
  ("yes.\n\nThe ball is red.", True),
  ("The answer is: Yes", True),
  ("no, not at all", False),
  ("Hmm, no.", False),
  ("Yes... actually no.", None),
  ("Nor is it red.", None),
  ("**Yes** - the dog runs.", True),
  ("Final answer: no", False),
  ("Y", None),
  ("<answer>No</answer>", False),
  ("对\uff0c有狗。", True),
  ("否\uff0c没有狗。", False),
  ("not yes", None),
  ("The answer to the question is yes.", True),
  ("✅ Yes", True),
  ("Yes, but only partly.", True),
  ("No - it is a cat.", False),
  ("NO!!!", False),
  ("Answer:\nyes", True),
  ("Can't tell.", None),
  ("I do not know.", None),
  ("yes yes", True),
  ("It is not. No.", None),
  ("Certainly, yes.", True),
  ("不\uff0c没有狗。", False),
  ("{\"verdict\": \"no\"}", False),
]  # fmt: skip

NAMES = ("red", "dark red", "blue", "a red ball moves")
CHOICES = [
  ("C", "C"), ("c", "C"), (" (C) ", "C"), ("**C**", "C"), ("C.", "C"), ("C. blue", "C"),
  ("[C]", "C"), ("C: blue", "C"), ("A", "A"), ("A. red", "A"), ("[[B]]", "B"),
  ("B\nbecause A is wrong", "B"), ("The answer is (C).", "C"), ("Answer: C", "C"),
  ("The answer is option B.", "B"), ("Answer: A\nBecause B is wrong", "A"),
  ("I think it is B", "B"), ("Option C is right", "C"), ("It is B, not C.", "B"),
  ("blue", "C"), ("Blue.", "C"), ("Dark red.", "B"), ("The answer is dark red.", "B"),
  ("A red ball moves", "D"), ("\uff23", "C"), ("\uff08\uff23\uff09 blue", "C"),
  ("<think>A</think>C", "C"), ('{"answer": "B"}', "B"), ("\\boxed{C}", "C"),
  ("答案是C", "C"), ("答案\uff1aC", "C"), ("选B", "B"), ("Answer: b", "B"),
  ("", None), ("?", None), ("E", None), ("The answer is F.", None), ("A or B", None),
  ("A and B", None), ("A, B and C", None), ("A man walks.", None),
  ("The answer is A man.", None), ("I think so", None), ("D.C. is shown", None),
  ("B-roll", None), ("Bad", None), ("not C", None), ("The answer is not C.", None),
  ("Neither B nor C.", None), ("yellow", None), ("red or blue", None),
  ("A. No, the answer is B.", None), ("<think>C", None), ("B. blue", None),
  ("The answer is A or B.", None),
]  # fmt: skip

OTHER_NAMES = ("a cat", "two dogs", "a boat", "none of these")
OTHER_CHOICES = [
  # Written before the parser read them.
  ("Option B: two dogs", "B"),
  ("The correct answer is D. none of these", "D"),
  ("I would choose C.", "C"),
  ("A cat", "A"),
  ("It could be A or C.", None),
  ("Final Answer: (B)", "B"),
  ("The correct option is B.", "B"),
  ("(C) a boat", "C"),
  ("Both A and C", None),
  ("**Answer: D**", "D"),
  ("I choose (A).", "A"),
  ("two dogs.", "B"),
  ("Option A is wrong, so B", None),
  ("It's not A, it's B.", "B"),
  ("我选C", "C"),
  ("Answer: C. a boat\n\nExplanation: A is wrong.", "C"),
  ("A cat is on a boat", None),
  ("B because A is wrong", "B"),
  ("Option B, since A is wrong", "B"),
  ("The correct answer is not A but B", "B"),
  ("B, C", None),
  ("A. a cat\nB. two dogs\nC. a boat\nAnswer: C", None),
  ("**B**", "B"),
  ("b)", "B"),
  ("Option (C).", "C"),
  ("The answer is \"two dogs\".", "B"),
  ("none of these", "D"),
  ("I'm not sure, maybe B.", "B"),
  ("The answer is not B.", None),
  ("AB", None),
  ("D) none of these", "D"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "yes"), YES_NO)
def test_yes_or_no_is_a_word(reply, yes):
  assert parse_yes_no(reply) is yes


@pytest.mark.parametrize(
  ("reply", "letter", "names"),
  [(*row, NAMES) for row in CHOICES] + [(*row, OTHER_NAMES) for row in OTHER_CHOICES],
)
def test_an_option_is_stated_by_its_letter_or_its_text(reply, letter, names):
  index = None if letter is None else "ABCD".index(letter)
  assert parse_choice(reply, names) == index


def test_options_of_one_text_are_not_told_apart():
  assert parse_choice("red", ("red", "Red.")) is None
