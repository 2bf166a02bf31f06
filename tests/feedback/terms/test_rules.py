import pytest

from tests.feedback.terms.samples import sample
from vlmrlaif_jax.feedback.terms import rules


def test_stop_is_one_for_a_response_without_an_end():
  assert rules.score_missing_stop([sample(), sample(stopped=False)]) == [0, 1]


def test_length_is_a_share_of_the_largest_length():
  assert rules.score_length([sample(), sample(tokens=(1,) * 6)]) == [0.5, 1]


def test_a_pattern_is_searched_or_matched_in_full():
  texts = [sample(response=text) for text in ("a red ball", "red", "blue")]
  assert rules.score_regex(texts, pattern="red") == [1, 1, 0]
  assert rules.score_regex(texts, pattern="red", full=True) == [0, 1, 0]


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("<think>a\nb</think>\n<answer>c</answer>", 1),
    ("<answer>c</answer><think>a</think>", 0),
    ("<think>a</think><answer>c</answer> more", 0),
    ("<think>a</think><think>b</think><answer>c</answer>", 0),
  ],
)
def test_format_requires_one_block_of_each_tag_in_order(text, value):
  assert rules.score_format([sample(response=text)]) == [value]


def test_a_match_needs_a_reference_answer():
  texts = [sample(response="the DOG"), sample(response="cat"), sample(answer="")]
  assert rules.score_match(texts) == [1, 0, None]
  assert rules.score_match(texts[:1], measure="f1") == [1]
  with pytest.raises(ValueError, match="measure must be one of match, boxed, f1"):
    rules.score_match(texts, measure="exact")
