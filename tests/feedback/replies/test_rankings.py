"""A table of rankings with their right reading."""

import pytest

from vlmrlaif_jax.feedback.replies.rankings import parse_ranking

# Full-width characters are escapes: \uff21 is A, \uff08 a bracket, \uff1a a colon.

RANKINGS = [  # Ranks of three responses.
  ("[3, 1, 2]", [1, 2, 0]),
  ("From best to worst: [ 2 , 3 , 1 ].\n", [2, 0, 1]),
  ("[3, 1, 2] because [1] is vague", [1, 2, 0]),
  ("[2] > [1] > [3]", [1, 0, 2]),
  ("2 > 1 = 3", [1, 0, 1]),
  ("1, 3, 2", [0, 2, 1]),
  ("Response 2 > Response 1 > Response 3", [1, 0, 2]),
  ("Response 2 is best, then 1, then 3", [1, 0, 2]),
  ("2, followed by 1 and then 3.", [1, 0, 2]),
  ("Response 3 is better than response 1, which is worst.", None),
  ("1. Response 3\n2. Response 1\n3. Response 2", [1, 2, 0]),
  ("Rank 1: Response 2\nRank 2: Response 3\nRank 3: Response 1", [2, 0, 1]),
  ("1st: [2]\n2nd: [3]\n3rd: [1]", [2, 0, 1]),
  ("<think>[1, 2, 3]</think>[3, 1, 2]", [1, 2, 0]),
  ("```json\n[3, 1, 2]\n```", [1, 2, 0]),
  ('{"ranking": [3, 1, 2]}', [1, 2, 0]),
  ("**Ranking:** 3 > 1 > 2", [1, 2, 0]),
  ("\\boxed{3, 1, 2}", [1, 2, 0]),
  ("\uff3b3\uff0c1\uff0c2\uff3d", [1, 2, 0]),
  ("First thought: [1, 2, 3]. Final ranking: [3, 1, 2]", [1, 2, 0]),
  ("From worst to best: 2, 1, 3", [1, 2, 0]),
  ("回答2 > 回答1 > 回答3", [1, 0, 2]),
  ("[3, 1]", None),
  ("[3, 1, 2, 2]", None),
  ("[0, 1, 2]", None),
  ("[1, 2, 4]", None),
  ("[1, 1, 3]", None),
  ("[3 1 2]", None),
  ("2 > 3", None),
  ("2 > 3 > 2", None),
  ("[1, 2, 3] or [2, 1, 3]", None),
  ("[a, b, c]", None),
  ("[1.0, 2.0, 3.0]", None),
  ("All 3 are good.", None),
  ("<think>[3, 1, 2]", None),
  ("", None),
  # Written before the parser read them.
  ("Best to worst: 2, 3, 1", [2, 0, 1]),
  ("Response 1 > Response 3 = Response 2", [0, 1, 1]),
  ("I think 2 is the best, followed by 3, and finally 1.", [2, 0, 1]),
  ("The best is response 2.", None),
  ("Ranking: [2], [3], [1]", [2, 0, 1]),
  ("2>3>1", [2, 0, 1]),
  ("3 = 1 > 2", [0, 2, 0]),
  ("1 2 3", None),
  ("Response 2\nResponse 1\nResponse 3", [1, 0, 2]),
  ("I rank them: Response 3 > Response 2 > Response 1.", [2, 1, 0]),
  ("[1, 2]", None),
  ("The order is 2, 1, and 3.", [1, 0, 2]),
  ("Responses 1, 2, and 3 are all good.", None),
  ("Responses 1, 2, 3 are good; 3 > 1 > 2.", [1, 2, 0]),
  ("3 > 2 > 1.", [2, 1, 0]),
  ("[3,2,1]", [2, 1, 0]),
  ("(2) > (1) > (3)", [1, 0, 2]),
  ("Ranking (best to worst): 3, 1, 2", [1, 2, 0]),
  ("Best: Response 1. Worst: Response 3.", None),
  ("{\"ranks\": \"2 > 3 > 1\"}", [2, 0, 1]),
  ("1 > 2, 3", None),
  ("Response 2, Response 3, Response 1", [2, 0, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "ranks"), RANKINGS)
def test_a_ranking_names_each_response_once(reply, ranks):
  assert parse_ranking(reply, 3) == ranks
