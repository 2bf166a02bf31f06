r"""Tables of scores with their right reading."""

import pytest

from vlmrlaif_jax.feedback.replies.scores import parse_boxed_scores, parse_score

# Full-width characters are escapes: \uff21 is A, \uff08 a bracket, \uff1a a colon.

SCORES = [  # (reply, highest score, score)
  ('{"score": 4}', 5, 4),
  ("{'score': 4.8}", 5, 4.8),
  ("{'score': '3'}", 5, 3),
  ("```json\n{'pred': 'yes', 'score': 0}\n```", 5, 0),
  ("**Score:** 4/5.", 5, 4),
  ("score = 5.", 5, 5),
  ("4", 5, 4),
  ("8/10", 10, 8),
  ("Score: 4.5 out of 5", 5, 4.5),
  ("Rating: [[7]]", 10, 7),
  ("[[7]]", 10, 7),
  ("Score: 4,5", 5, 4.5),
  ("Score\uff1a\uff14", 5, 4),
  ("I would give this answer a 4.", 5, 4),
  ("I rate it 3 out of 5, because it omits the dog.", 5, 3),
  ("The score is 4.", 5, 4),
  ("Score (0-5): 4", 5, 4),
  ("**Score**\n\n4/5", 5, 4),
  ("4\nThe answer matches.", 5, 4),
  ("Detail score: 3\nOverall score: 4", 5, 4),
  ("评分\uff1a4分", 5, 4),
  ("得分\uff1a4分\uff08满分5分\uff09", 5, 4),
  ("\\boxed{4}", 5, 4),
  ("<score>4</score>", 5, 4),
  ("<think>score: 1</think>score: 4", 5, 4),
  ("4 stars", 5, 4),
  ("", 5, None),
  ("Good.", 5, None),
  ('{"score": 6}', 5, None),
  ('{"score": -1}', 5, None),
  ('{"score": four}', 5, None),
  ("7", 5, None),
  ("{'score': 3} or rather {'score': 5}", 5, None),
  ("score: 4/10", 5, None),
  ("score: nan", 5, None),
  ("4 of 9", 5, None),
  ("{'underscore': 4}", 5, None),
  ("Score: 4-5", 5, None),
  ("Score: 4 to 5", 5, None),
  ("Score: 4\u20135", 5, None),
  ("80%", 5, None),
  ("Score: 4%", 5, None),
  ("The answer names 3 dogs.", 5, None),
  ("Score: 1.2.3", 5, None),
  # Written before the parser read them.
  ("Score: 3/5 because it omits the ball.", 5, 3),
  ("I'd rate this response 2/5.", 5, 2),
  ("**Rating**: 4", 5, 4),
  ("{\"reason\": \"5 balls\", \"score\": 2}", 5, 2),
  ("The score would be somewhere between 3 and 4.", 5, None),
  ("Score: 4.0", 5, 4),
  ("Final score: 3. (Initial score: 4)", 5, 3),
  ("3.", 5, 3),
  ("Five", 5, None),
  ("score:4", 5, 4),
  ("Score: 4 / 5", 5, 4),
  ("I'd give it 4.5/5 stars.", 5, 4.5),
  ("Score: **5**", 5, 5),
  ("The predicted answer gets a 2.", 5, 2),
  ("Rating: 3\n\nRating: 3", 5, 3),
  ("{'score': 4.5, 'pred': 'yes'}", 5, 4.5),
  ("score: 5 out of 10", 5, None),
  ("Score: between 2 and 3", 5, None),
  ("得分\uff1a3", 5, 3),
  ("3/5\n\nThe answer is partly right.", 5, 3),
  ("Score: 0", 5, 0),
  ("Score: 4 (out of 5)", 5, 4),
  ("Score: 4 (out of 10)", 5, None),
  ("Score - 4", 5, 4),
  ("1. Accuracy: 4\n2. Detail: 3", 5, None),
  ("My score: 4", 5, 4),
  ("Score:\n4", 5, 4),
  ("{\"score\": \"4/5\"}", 5, 4),
  ("Score = 4.", 5, 4),
  ("I give 10 out of 10.", 10, 10),
  ("score: 4 because 3 of 5 objects are right", 5, 4),
  ("Rating: five", 5, None),
  ("The response deserves a 3.", 5, 3),
  ("0", 5, 0),
  ("**4/5** - good", 5, 4),
]  # fmt: skip

BOXES = [
  (r"\boxed{8, 6}", (8, 6)),
  (r"\boxed{7.5, 7}", (7.5, 7)),
  (r"\boxed{1, 9} no, \boxed{9, 1}", (9, 1)),
  ("\\boxed{8\uff0c6}", (8, 6)),
  ("Scores: [[8, 6]]", (8, 6)),
  (r"<think>\boxed{1, 2}</think>\boxed{8, 6}", (8, 6)),
  (r"<think>\boxed{8, 6}", None),
  (r"\boxed{7}", None),
  (r"\boxed{7,8,9}", None),
  ("Scores: 8, 6", None),
  (r"\boxed{8,6", None),
]


@pytest.mark.parametrize(("reply", "high", "score"), SCORES)
def test_a_score_is_one_number_of_its_scale(reply, high, score):
  assert parse_score(reply, high=high) == score


@pytest.mark.parametrize(("reply", "scores"), BOXES)
def test_scores_of_several_responses_are_in_one_box(reply, scores):
  assert parse_boxed_scores(reply, 2) == scores


def test_a_score_of_the_name_outweighs_others():
  reply = '{"pred": "yes", "score": 5, "rating": 6}'
  assert parse_score(reply, high=6, name="rating") == 6
  assert parse_score(reply, high=5) == 5
  assert parse_score("Score: 4", high=6, name="rating") == 4
