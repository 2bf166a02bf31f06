"""Groups are ranked, and what cannot be read is counted and never filled in."""

import re
from typing import NamedTuple

import numpy as np
import pytest

from vlmrlaif_jax.data import prompts
from vlmrlaif_jax.feedback import rankers
from vlmrlaif_jax.feedback.replies.rankings import parse_ranking


def example(id):
  return {
    "id": id, "video": f"{id}.mp4", "question": "What is it?", "answer": "",
    "source": "", "turns": [],
  }  # fmt: skip


EXAMPLES = [example("a"), example("b")]
GROUPS = [["a red ball", "red", "a big red ball"], ["x", "xxxx", "xx"]]
LONGEST_FIRST = [[1, 2, 0], [2, 0, 1]]


def test_the_prompt_asks_for_what_is_read():
  asked = []
  rankers.listwise_ranker(lambda queries: asked.extend(queries) or ["[1, 2, 3]"] * 2)(
    EXAMPLES, GROUPS
  )
  assert parse_ranking(asked[0].prompt.rsplit("such as", 1)[1], 3) == [2, 0, 1]
  assert [q.video for q in asked] == ["a.mp4", "b.mp4"]
  assert "What is it?" in asked[0].prompt
  assert "[1] a red ball\n[2] red\n[3] a big red ball\n" in asked[0].prompt


# Judges that like what is long.


def length(text):
  return float(len(text.strip()))


def list_judge(queries):
  return [said_in_order(query.prompt) for query in queries]


def said_in_order(prompt):
  shown = re.findall(r"^\[(\d)\] (.*)$", prompt, re.MULTILINE)
  order = sorted(shown, key=lambda row: -len(row[1]))
  return f"[{', '.join(number for number, _ in order)}]"


def pair_judge(queries):
  def verdict(a, b):
    return prompts.BETTER_VERDICT.format("A" if len(a) > len(b) else "B", "longer")

  found = [re.search(r"Output A: (.*) Output B: (.*) Which", q.prompt) for q in queries]
  return [verdict(*match.groups()) for match in found]


ORACLES = {
  "scores": rankers.score_ranker(
    lambda examples, texts: np.array([*map(length, texts)])
  ),
  "truth": rankers.truth_ranker(lambda example, text: 20 - int(length(text))),
  "list": rankers.listwise_ranker(list_judge),
  "wins": rankers.pairwise_ranker(pair_judge, prompts.BRIEF_PROMPTS),
}


@pytest.mark.parametrize("name", ORACLES)
def test_oracles_that_like_the_same_agree(name):
  found = ORACLES[name](EXAMPLES, GROUPS)
  np.testing.assert_array_equal(-found.scores, LONGEST_FIRST)
  assert found.valid.all()


@pytest.mark.parametrize("name", ORACLES)
def test_the_same_response_twice_ranks_alike(name):
  found = ORACLES[name](EXAMPLES, [["red", "big red", "red"], ["x", "x", "x"]])
  np.testing.assert_array_equal(-found.scores, [[1, 0, 1], [0, 0, 0]])
  assert found.valid.all()


@pytest.mark.parametrize("name", ORACLES)
def test_an_empty_response_is_last(name):
  found = ORACLES[name](EXAMPLES, [["red", "", "big red"], ["", "x", " "]])
  np.testing.assert_array_equal(-found.scores, [[1, 2, 0], [1, 0, 1]])
  assert found.valid.all()


def test_nothing_is_asked_of_a_group_that_says_one_thing():
  def ask(queries):
    assert not queries
    return []

  for oracle in (
    rankers.listwise_ranker(ask),
    rankers.pairwise_ranker(ask, prompts.BRIEF_PROMPTS),
  ):
    found = oracle(EXAMPLES, [["x", "x "], ["y", "y"]])
    np.testing.assert_array_equal(found.scores, 0)
    assert found.valid.all()


@pytest.mark.parametrize("reply", [None, "", "[1, 2]", "I like the second."])
def test_a_list_that_cannot_be_read_fails_its_group_alone(reply):
  ask = lambda queries: [reply, *list_judge(queries)[1:]]
  found = rankers.listwise_ranker(ask)(EXAMPLES, GROUPS)
  assert (found.calls, found.unread) == (2, 1)
  np.testing.assert_array_equal(found.valid, [[False] * 3, [True] * 3])
  np.testing.assert_array_equal(-found.scores[1], LONGEST_FIRST[1])


@pytest.mark.parametrize("reply", [None, "", "It depends."])
def test_a_verdict_that_cannot_be_read_fails_its_group_alone(reply):
  said = lambda q, text: reply if "Output A: red Output B: a big" in q.prompt else text
  ask = lambda queries: [
    said(q, t) for q, t in zip(queries, pair_judge(queries), strict=True)
  ]
  found = rankers.pairwise_ranker(ask, prompts.BRIEF_PROMPTS)(EXAMPLES, GROUPS)
  assert (found.calls, found.unread) == (12, 1)
  np.testing.assert_array_equal(found.valid, [[False] * 3, [True] * 3])
  np.testing.assert_array_equal(-found.scores[1], LONGEST_FIRST[1])


def test_a_judge_that_goes_by_place_ranks_all_alike():
  ask = lambda queries: [prompts.BETTER_VERDICT.format("A", "first")] * len(queries)
  found = rankers.pairwise_ranker(ask, prompts.BRIEF_PROMPTS)(EXAMPLES, GROUPS)
  np.testing.assert_array_equal(found.scores, 0)
  assert found.valid.all()


def test_what_is_not_known_or_has_no_score_is_not_valid():
  unknown = rankers.truth_ranker(lambda e, text: None if text == "xx" else len(text))
  found = unknown(EXAMPLES, GROUPS)
  np.testing.assert_array_equal(found.valid, [[True] * 3, [False] * 3])
  np.testing.assert_array_equal(-found.scores[0], [1, 0, 2])


class Sampled(NamedTuple):
  """The part of a batch that a scorer reads."""

  tokens: np.ndarray
  loss_mask: np.ndarray


def test_a_scorer_gives_minus_the_rank_and_fails_whole_groups():
  tokens = np.arange(6).reshape(6, 1)
  texts = [text for group in GROUPS for text in group]
  read = lambda tokens, mask: [texts[i] for i in tokens[:, 0]]
  ask = lambda queries: [None if q.video == "a.mp4" else said_in_order(q.prompt)
                         for q in queries]  # fmt: skip
  examples = [example("c"), *EXAMPLES]
  score = rankers.make_score_fn(rankers.listwise_ranker(ask), examples, read, stops=())
  asked = {"example_ids": np.array([1, 2])}
  scores, valid = score(asked, Sampled(tokens, tokens >= 0))
  np.testing.assert_array_equal(scores[3:], [-2, 0, -1])
  np.testing.assert_array_equal(valid, [False] * 3 + [True] * 3)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("scores", [[0, -1, -2, -3, -4], [0, 0, -2, -2, -4], [5, 5]])
def test_noise_is_the_share_of_pairs_in_the_wrong_order(share, scores):
  scores = np.array(scores, float)
  rng = np.random.default_rng(0)
  higher = scores[:, None] > scores[None]
  wrong = []
  for _ in range(400):
    noisy = rankers.reorder_pairs(scores, share, rng)
    assert noisy.max() == 0 and noisy.min() > -len(scores)
    wrong.append(np.sum(higher & (noisy[:, None] < noisy[None])))
    assert not np.any(higher & (noisy[:, None] == noisy[None]))  # No new ties.
  pairs = higher.sum()
  assert set(wrong) <= {int(share * pairs), int(share * pairs) + 1}
  np.testing.assert_allclose(np.mean(wrong), share * pairs, atol=0.08)
