r"""A judge's scores read strictly, and groups scored by comparing with each other."""

import re
from typing import NamedTuple

import numpy as np
import pytest

from vlmrlaif_jax.feedback import generative_rm, rankers
from vlmrlaif_jax.feedback.generative_rm import parse_scores

NAN = np.nan
# What a stub of a judge can read.
STYLE = generative_rm.JudgeStyle("{question}|{a}|{b}", "", parse_scores)


def example(id, **truth):
  return {
    "id": id, "video": f"{id}.mp4", "question": "What is it?", "answer": "",
    "source": "", "turns": [], "truth": truth,
  }  # fmt: skip


def preference(id, preferred=1, **more):
  return {
    "id": id, "video": "v.mp4", "question": "Who?", "output_1": "on\n e",
    "output_2": "two", "preference": preferred, "source": "test", **more,
  }  # fmt: skip


# The scores in a judge's text, and the rule.


@pytest.mark.parametrize(
  ("text", "if_first", "if_second"),
  [
    (r"\boxed{8, 6}", 1, 0),
    (r"\boxed{6, 8}", 0, 1),
    (r"\boxed{6,6}", 0, 0),
    (r"\boxed{7}", 0, 0),
    (r"\boxed{7,8,9}", 0, 0),
    (r"\boxed{seven,8}", 0, 0),
    ("Scores: 8, 6", 0, 0),
    (r"\boxed{7.5, 7}", 1, 0),
    (r"\boxed{8,6,}", 1, 0),  # An empty piece does not count.
    (r"\boxed{1000,1}", 1, 0),  # There is no range.
    (r"\boxed{1, 9} no, \boxed{9, 1}", 1, 0),  # The last one counts,
    (r"\boxed{9, 1} or \boxed{}", 0, 0),  # whatever is in it.
    (r"\boxed{8, 6} or \boxed{8, 6", 0, 0),
    (r"\boxed{8,6", 0, 0),
    (r"\boxed{nan, 1}", 0, 0),
    (r"\boxed{inf, 1}", 0, 0),
    (r"\boxed{{8}, 6}", 0, 0),
    (r"\boxed{\text{8}, 6}", 0, 0),
    (r"\boxed{8 6}", 0, 0),
    ("Scores: \\boxed{\n 8 ,\n 6\n}.", 1, 0),
    ("boxed{8, 6}", 0, 0),
    ("", 0, 0),
  ],
)
def test_the_reward_is_one_if_and_only_if_the_better_has_more(
  text, if_first, if_second
):
  assert generative_rm.compute_verdict_reward(text, 1, parse_scores) == if_first
  assert generative_rm.compute_verdict_reward(text, 2, parse_scores) == if_second


@pytest.mark.parametrize("style", generative_rm.JUDGE_STYLES.values())
def test_a_prompt_shows_both_answers_in_order(style):
  prompt = style.prompt.format(question="Q {x}", a="first {a}", b="second")
  assert "Q {x}" in prompt
  assert prompt.index("first {a}") < prompt.index("second", prompt.index("first"))


def test_the_papers_prompt_asks_for_the_box_that_is_read():
  prompt = generative_rm.PAPER_STYLE.prompt.format(question="Q", a="first", b="second")
  assert re.search(r"\\boxed\{\w+, \w+\}", prompt)


@pytest.mark.parametrize(
  ("text", "scores"),
  [
    ("Output A is better because it is brief.", (8, 4)),
    ("Output B is better.", (4, 8)),
    ("Both outputs are equally good.", (6, 6)),
    ("Output C is better.", None),
  ],
)
def test_a_verdict_in_words_stands_for_scores(text, scores):
  assert generative_rm.parse_worded_scores(text) == scores


# Judge prompts from preferences.


@pytest.mark.parametrize("preferred", [1, 2])
def test_the_better_answer_stands_where_the_truth_says(preferred):
  rows = [preference(str(i), preferred) for i in range(20)]
  for made in generative_rm.make_judge_examples(rows, STYLE):
    places = made["question"].split("|")
    assert places[made["truth"]["better"]] == ["on e", "two"][preferred - 1]
    assert made["turns"] == [(made["question"], "")]


def test_places_are_balanced_whatever_is_preferred():
  rows = [preference(f"clip-{i:04}") for i in range(1000)]
  better = [
    made["truth"]["better"] for made in generative_rm.make_judge_examples(rows, STYLE)
  ]
  assert abs(np.mean(better) - 1.5) < 0.03  # Two standard errors.


def test_a_place_depends_on_the_id_alone():
  rows = [preference(str(i)) for i in range(20)]
  found = {m["id"]: m["truth"] for m in generative_rm.make_judge_examples(rows, STYLE)}
  again = [{**preference(str(i), 2), "question": "Why?"} for i in range(19, 4, -1)]
  for made in generative_rm.make_judge_examples(again, STYLE):
    assert made["truth"] == found[made["id"]]


def test_a_judge_is_told_the_turns_before():
  row = preference("x", history=[("Where?", "Here.")])
  [made] = generative_rm.make_judge_examples([row], STYLE)
  assert made["question"].split("|")[0] == "Where?\nHere.\nWho?"


def test_verdicts_are_scores_of_a_group():
  found = generative_rm.compare_by_verdict(STYLE)(
    [example("a", better=1), example("b", better=2)],
    [[r"\boxed{8, 6}", "what?"], [None, r"\boxed{5, 6}"]],
  )
  np.testing.assert_array_equal(found.scores, [[1, 0], [0, 1]])
  assert found.valid.all()
  assert (found.calls, found.unread) == (4, 2)


@pytest.mark.parametrize("style", generative_rm.JUDGE_STYLES.values())
def test_a_verdict_to_imitate_is_right_and_says_so_in_words(style):
  rows = [preference(str(i), 2) for i in range(9)]
  told = generative_rm.make_demonstrations(rows, style)
  assert {made["truth"]["better"] for made in told} == {1, 2}
  for made, asked in zip(
    told, generative_rm.make_judge_examples(rows, style), strict=True
  ):
    better = asked["truth"]["better"]
    assert made["question"] == asked["question"]
    assert made["turns"] == [(made["question"], made["answer"])]
    assert generative_rm.compute_verdict_reward(made["answer"], better, style.read) == 1
    assert f"{'AB'[better - 1]} is better" in made["answer"]


# Comparing a group.


class Judge:
  """Knows what to say to (first, second); counts what it is asked."""

  def __init__(self, said):
    self.said, self.asked = said, []

  def __call__(self, queries):
    pairs = [tuple(query.prompt.split("|")[1:]) for query in queries]
    self.asked += pairs
    return [self.said(*pair) for pair in pairs]


def boxed(first, second):
  return rf"\boxed{{{first}, {second}}}"


def of_table(table):
  return Judge(lambda a, b: boxed(*table[a, b]))


def by_length(a, b):
  return boxed(len(a), len(b))


PAPERS = {("1", "2"): (8, 4), ("1", "3"): (7, 6), ("2", "3"): (5, 9)}


def scores_of(judge, responses, **options):
  compare = generative_rm.compare_in_pairs(judge, STYLE, **options)
  found = compare([example("a")], [responses])
  np.testing.assert_array_equal(found.valid, np.isfinite(found.scores))
  return found.scores[0]


def test_one_order_is_the_papers_example():
  found = scores_of(of_table(PAPERS), ["1", "2", "3"], both_orders=False)
  np.testing.assert_array_equal(found, [7.5, 4.5, 7.5])


@pytest.mark.parametrize("incomplete", [None, "", " "])
def test_an_incomplete_response_has_0_and_is_not_compared(incomplete):
  judge = of_table(PAPERS)
  found = scores_of(judge, ["1", "2", incomplete], both_orders=False)
  np.testing.assert_array_equal(found, [8, 4, 0])
  assert judge.asked == [("1", "2")]


def test_both_orders_are_averaged():
  table = PAPERS | {("2", "1"): (4, 6), ("3", "1"): (8, 5), ("3", "2"): (9, 3)}
  found = scores_of(of_table(table), ["1", "2", "3"])
  np.testing.assert_array_equal(found, [6.5, 4, 8])  # (8+7+6+5)/4, ...


@pytest.mark.parametrize(("both", "calls"), [(True, 20), (False, 10)])
def test_the_number_of_calls_is_of_pairs_and_orders(both, calls):
  compare = generative_rm.compare_in_pairs(Judge(by_length), STYLE, both_orders=both)
  found = compare([example("a")], [["x" * n for n in range(1, 6)]])
  assert (found.calls, found.unread) == (calls, 0)


def test_what_is_out_of_range_is_clamped():
  found = scores_of(Judge(lambda a, b: boxed(1000, -3)), ["x", "y"], both_orders=False)
  np.testing.assert_array_equal(found, [10, 1])


@pytest.mark.parametrize("reply", [None, "", r"\boxed{7}"])
def test_a_comparison_that_cannot_be_read_is_dropped_alone(reply):
  judge = Judge(lambda a, b: reply if (a, b) == ("1", "3") else boxed(*PAPERS[a, b]))
  compare = generative_rm.compare_in_pairs(judge, STYLE, both_orders=False)
  found = compare([example("a")], [["1", "2", "3"]])
  np.testing.assert_array_equal(found.scores, [[8, 4.5, 9]])
  assert (found.calls, found.unread) == (3, 1)


def test_the_mean_is_of_what_was_read():
  games = np.full((3, 3, 2), NAN)
  games[0, 1], games[1, 0] = (9, 7), (4, 6)  # In both orders.
  games[0, 2, 0], games[2, 0, 1] = 2, 3  # In one.
  np.testing.assert_allclose(generative_rm.average_pair_scores(games), [6, 5, 3])


def test_a_response_without_any_comparison_is_not_valid():
  judge = Judge(lambda a, b: "?" if "3" in (a, b) else boxed(8, 4))
  found = scores_of(judge, ["1", "2", "3", None], both_orders=False)
  assert found[0] > found[1] > found[3] == 0
  assert np.isnan(found[2])


@pytest.mark.parametrize("responses", [["x", None, None], ["x", "x ", None], ["x"] * 3])
def test_a_group_of_one_survivor_is_not_valid(responses):
  judge = Judge(by_length)
  assert np.isnan(scores_of(judge, responses)).all()
  assert not judge.asked


def test_a_group_without_survivors_has_0():
  np.testing.assert_array_equal(scores_of(Judge(by_length), [None, "", None]), 0)


def test_the_same_response_twice_scores_alike():
  for responses in (["x", "yyy", "x", "zz"], ["zz", "x", "x ", "yyy"]):
    found = scores_of(Judge(by_length), responses)
    x, z, y = (found[[t.strip() == s for t in responses]] for s in ("x", "zz", "yyy"))
    assert x[0] == x[1] < z[0] < y[0]


def test_what_is_said_twice_counts_twice_to_others():
  table = {("x", "y"): (3, 9), ("x", "z"): (3, 9), ("y", "z"): (6, 6)}
  found = scores_of(of_table(table), ["x", "x", "y", "z"], both_orders=False)
  np.testing.assert_array_equal(found, [3, 3, 8, 8])  # (9 + 9 + 6) / 3


def test_identical_pairs_are_asked_once():
  judge = Judge(by_length)
  group = ["x", "yy", "x"]
  compare = generative_rm.compare_in_pairs(judge, STYLE)
  found = compare([example("a")] * 2 + [example("b")], [group, group[::-1], group])
  # A video each of two orders; who comes first in the group makes no difference.
  assert sorted(judge.asked) == [("x", "yy")] * 2 + [("yy", "x")] * 2
  assert found.calls == 4
  np.testing.assert_array_equal(found.scores, [[1, 2, 1]] * 3)


def test_a_query_shows_the_video_and_the_question():
  asked = []
  ask = lambda queries: asked.extend(queries) or [boxed(1, 2)] * len(queries)
  generative_rm.compare_in_pairs(ask, STYLE)([example("a")], [["x", "y"]])
  assert [q.prompt for q in asked] == ["What is it?|x|y", "What is it?|y|x"]
  assert {q.video for q in asked} == {"a.mp4"}
  assert len({q.id for q in asked}) == 2


@pytest.mark.parametrize("count", [2, 6, 7])
def test_each_response_may_meet_one_other(count):
  judge = Judge(by_length)
  responses = ["x" * n for n in range(1, count + 1)]
  found = scores_of(judge, responses, one_opponent=True, both_orders=False)
  met = sorted(sum(text in pair for pair in judge.asked) for text in responses)
  assert met == [1] * (count - count % 2) + [2] * (count % 2)  # One of an odd number.
  assert len(set(judge.asked)) == len(judge.asked) == (count + 1) // 2
  assert np.isfinite(found).all()


def test_the_one_other_is_drawn_by_the_question_and_the_responses():
  def asked_of(id, responses):
    judge = Judge(by_length)
    compare = generative_rm.compare_in_pairs(judge, STYLE, one_opponent=True)
    compare([example(id)], [responses])
    return sorted(judge.asked)

  responses = list("abcdefgh")
  assert asked_of("a", responses) == asked_of("a", responses)
  assert asked_of("a", responses) != asked_of("b", responses)


# As the score of a method.


class Sampled(NamedTuple):
  tokens: np.ndarray
  loss_mask: np.ndarray


def test_a_score_has_a_row_for_each_response_and_knows_what_was_cut():
  eos = 9
  tokens = np.array([[9, 1, 1, eos], [9, 1, 7, 0], [9, 1, 1, 1], [9, 1, 1, eos]])
  mask = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]], bool)
  read = lambda tokens, mask: ["x" * row.sum() for row in (tokens == 1) & mask]
  compare = generative_rm.compare_in_pairs(Judge(by_length), STYLE)
  score = rankers.make_score_fn(
    compare, [example("a"), example("b")], read, stops=(eos, 7)
  )
  scores, valid = score({"example_ids": np.array([1, 0])}, Sampled(tokens, mask))
  np.testing.assert_array_equal(scores, np.array([2, 1, NAN, NAN], np.float32))
  np.testing.assert_array_equal(valid, [True, True, False, False])
  assert scores.dtype == np.float32
