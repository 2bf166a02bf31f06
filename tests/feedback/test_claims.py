"""Answers split, asked about, counted and paired; the models are plain functions."""

import collections
import re

import jax.numpy as jnp
import numpy as np
import pytest

from vlmrlaif_jax.feedback import claims
from vlmrlaif_jax.feedback.claims import CheckedAnswer
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.feedback.replies.lists import parse_list

TRUE = {"it is red", "it is round", "it moves"}


def group(*answers, id="g"):
  return {"id": id, "video": f"{id}.mp4", "question": "What is it?"}, answers


def splitter(queries):
  """Splits at full stops, and puts "Is it so that" before each claim."""
  replies = []
  for query in queries:
    if query.id.startswith("split"):
      said = query.prompt.rsplit("Answer: ", 1)[1]
      items = [part.strip() for part in said.split(".") if part.strip()]
    else:
      listed = [line for line in query.prompt.splitlines() if "it " in line[:5]]
      items = [f"Is it so that {line.removeprefix('- ')}?" for line in listed]
    replies.append("### Here:\n" + "\n".join(f"- {item}" for item in items))
  return replies


def seer(queries):
  """Knows what is true, and is sure of it."""
  asked = [re.search(r"Is it so that (.*)\?", q.prompt)[1] for q in queries]
  return [(0.9, 0.1) if claim in TRUE else (0.2, 0.7) for claim in asked]


def checked(*groups, ask=splitter, yes_no=seer, style=claims.BRIEF_CLAIM_PROMPTS):
  examples, answers = zip(*groups, strict=True)
  return claims.check_claims(
    examples, answers, claims.ask_for_claims(ask, style), yes_no
  )


def scores(*answers, **given):
  [made] = checked(group(*answers), **given)
  return [each.score for each in made]


def outcomes(*answers, **given):
  [made] = checked(group(*answers), **given)
  return [each.outcome for each in made]


# Lists, yes and no.


def test_list_is_read_without_its_headings_and_bullets():
  text = "### Facts:\n- The ball is red.\n\n-It rolls.\n  - \n The cup is off-white."
  assert parse_list(text) == [
    "The ball is red.",
    "It rolls.",
    "The cup is off-white.",
  ]


def test_yes_or_no_is_read_as_a_probability_of_one():
  replies = ["Yes.", "No, it is red.", "Nothing moves.", None]
  yes_no = claims.ask_yes_no(lambda queries: replies)
  assert yes_no([None] * 4) == [(1.0, 0.0), (0.0, 1.0), None, None]


def test_chances_add_up_both_spellings_over_the_whole_vocabulary():
  logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.05, 0.35]]))
  made = claims.normalize_yes_no(logits, [0, 1], [3, 4])
  np.testing.assert_allclose(made, [[0.3, 0.4]], rtol=1e-5)


def test_chances_count_an_id_once_that_spells_both():
  logits = jnp.log(jnp.array([[0.1, 0.2, 0.7]]))
  made = claims.normalize_yes_no(logits, [0, 0], [1])
  np.testing.assert_allclose(made, [[0.1, 0.2]], rtol=1e-5)


# Scores.


@pytest.mark.parametrize(
  "style", claims.CLAIM_PROMPT_STYLES.values(), ids=claims.CLAIM_PROMPT_STYLES
)
def test_score_is_minus_the_number_of_claims_denied(style):
  answers = ["it is red. it moves.", "it is blue. it moves. it sings.", "it is blue."]
  assert scores(*answers, style=style) == [0, -2, -1]


@pytest.mark.parametrize(
  ("chances", "score"),
  [((0.02, 0.01), 0), ((0.5, 0.5), -1), ((0.0, 0.0), -1), ((0.4, 0.41), -1)],
)
def test_claim_stands_only_if_yes_is_the_likelier(chances, score):
  assert scores("it is red.", yes_no=lambda queries: [chances]) == [score]


def test_answer_without_claims_has_no_score():
  assert outcomes("", "it is red.") == ["no_claims", "scored"]


@pytest.mark.parametrize("reply", ["- one?", "- one?\n- two?\n- three?", ""])
def test_answer_with_more_or_fewer_questions_than_claims_has_no_score(reply):
  def ask(queries):
    return [reply if q.id.startswith("turn") else "- a\n- b" for q in queries]

  nothing_asked = lambda queries: [pytest.fail("asked") for _ in queries]
  assert outcomes("x", ask=ask, yes_no=nothing_asked) == ["mismatched"]


@pytest.mark.parametrize("step", ["split", "turn"])
def test_answer_that_could_not_be_asked_about_has_no_score(step):
  def ask(queries):
    said = zip(queries, splitter(queries), strict=True)
    return [None if q.id.startswith(step) else text for q, text in said]

  assert outcomes("it is red.", ask=ask) == ["unanswered"]


def test_answer_with_a_question_that_was_not_answered_has_no_score():
  yes_no = claims.ask_yes_no(
    lambda queries: ["Yes." if "red" in q.prompt else "Maybe." for q in queries]
  )
  made = outcomes("it is red.", "it is red. it moves.", yes_no=yes_no)
  assert made == ["scored", "unanswered"]


def test_by_text_passes_on_what_could_not_be_asked():
  yes_no = claims.ask_yes_no(lambda queries: [None, "No."])
  assert yes_no([JudgeQuery("a", "v", "x"), JudgeQuery("b", "v", "y")]) == [
    None,
    (0.0, 1.0),
  ]


def test_all_that_was_found_is_told():
  [[made]] = checked(group("it is red. it sings."))
  said, chances = ["it is red", "it sings"], [(0.9, 0.1), (0.2, 0.7)]
  assert made == CheckedAnswer("scored", -1, said, chances)


def test_question_is_asked_once_for_each_video():
  asked = []

  def yes_no(queries):
    asked.extend(queries)
    return seer(queries)

  answers = ("it is red. it moves.", "it is red. it is red.", "it is red. it moves.")
  made = checked(group(*answers), group("it is red.", id="h"), yes_no=yes_no)
  count = collections.Counter((q.video, q.prompt) for q in asked)
  assert set(count.values()) == {1} and len(count) == 3
  assert len({q.id for q in asked}) == 3
  assert [[each.score for each in row] for row in made] == [[0, 0, 0], [0]]


def test_same_question_about_another_video_may_have_another_answer():
  yes_no = lambda queries: [(float(q.video == "g.mp4"), 0.5) for q in queries]
  made = checked(group("it is red."), group("it is red.", id="h"), yes_no=yes_no)
  assert [row[0].score for row in made] == [0, -1]


def test_prompts_hold_question_answer_claims_and_what_to_do():
  seen = []

  def ask(queries):
    seen.extend(q.prompt for q in queries)
    return splitter(queries)

  def yes_no(queries):
    seen.extend(q.prompt for q in queries)
    return seer(queries)

  checked(group("it is {red}. it moves."), ask=ask, yes_no=yes_no)
  assert seen == [
    "List what the answer claims. Question: What is it? Answer: it is {red}. it moves.",
    "Turn each into a question.\nit is {red}\nit moves",
    "Is it so that it is {red}? Please answer yes or no.",
    "Is it so that it moves? Please answer yes or no.",
  ]


def test_claims_are_given_in_the_form_that_the_prompt_speaks_of():
  seen = []

  def ask(queries):
    seen.extend(q.prompt for q in queries)
    return splitter(queries)

  checked(group("it is red. it moves."), ask=ask, style=claims.PAPER_CLAIM_PROMPTS)
  assert seen[-1].endswith("### Sentences:\n- it is red\n- it moves")


# Pairs.


def pairs_of(scores, *, texts=None, id="g", **settings):
  texts = texts or [str(i) for i in range(len(scores))]
  return claims.choose_pairs(id, texts, scores, **{"seed": 0, **settings})


def test_pairs_are_all_that_differ_with_the_higher_score_chosen():
  made = pairs_of([-1, 0, -1, None, -3], limit=99)
  assert sorted(made) == [(0, 4), (1, 0), (1, 2), (1, 4), (2, 4)]


def test_pairs_differ_by_the_gap_at_least():
  assert pairs_of([0, -1, -2], limit=99, gap=2) == [(0, 2)]


def test_group_of_equal_scores_has_no_pair():
  assert pairs_of([-1, -1, -1]) == []


def test_answers_that_say_the_same_are_one():
  made = pairs_of([0, 0, -1, -1], texts=["a", "a", "b", "b"])
  assert made == [(0, 2)]


def test_two_pairs_are_drawn_evenly():
  drawn = [pairs_of([0, -1, -2], id=str(i)) for i in range(600)]
  assert {len(made) for made in drawn} == {2}
  count = collections.Counter(pair for made in drawn for pair in made)
  # Each of the three has 400 to expect, with a deviation of 12.
  assert all(350 < count[pair] < 450 for pair in [(0, 1), (0, 2), (1, 2)])


def test_draw_depends_on_the_seed_and_not_on_the_neighbours():
  made = [pairs_of([0, -1, -2, -3, -4], seed=seed) for seed in (0, 0, 1)]
  assert made[0] == made[1] != made[2]


# Lengths.


def words(count, of="w"):
  return " ".join([of] * count)


def pair(chosen, rejected):
  return words(chosen), words(rejected, "v")


def balanced_by_loop(pairs):
  """As published, with a list for each bound."""
  best = None
  for step in range(50):
    kept = []
    for i, (a, b) in enumerate(pairs):
      x, y = len(a.split()), len(b.split())
      if a != b and (y - x) / y <= step / 50:
        kept.append(i)
    if kept:
      x, y = (np.mean([len(pairs[i][k].split()) for i in kept]) for k in (0, 1))
      if best is None or abs(x - y) / y <= best[0] + 1e-12:
        best = (abs(x - y) / y, kept, step / 50)
  return best[1], best[2]


def test_balance_drops_the_pairs_whose_rejected_answer_is_much_longer():
  # Mean lengths are alike (10 and 10) without the last pair.
  kept, rho = claims.balance_lengths([pair(12, 10), pair(8, 10), pair(10, 40)])
  assert kept == [0, 1]
  assert 0.2 <= rho < 0.75


def test_balance_keeps_what_is_at_the_bound():
  # (50 - 1) / 50 = 0.98, and with that pair the mean lengths are alike.
  made = claims.balance_lengths([pair(1, 50), pair(99, 50)])
  assert made == ([0, 1], 0.98)


def test_balance_keeps_all_where_the_chosen_are_longer():
  made = claims.balance_lengths([pair(20, 10), pair(9, 10), pair(30, 10)])
  assert made == ([0, 1, 2], 0.98)


def test_balance_drops_equal_texts():
  same = (words(5), words(5))
  assert claims.balance_lengths([same, pair(5, 5)])[0] == [1]


@pytest.mark.parametrize("pairs", [[], [("a", "a")]])
def test_balance_of_nothing_keeps_nothing(pairs):
  assert claims.balance_lengths(pairs)[0] == []


@pytest.mark.parametrize("seed", range(5))
def test_balance_is_that_of_a_plain_loop(seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(3, 40, (30, 2)) + [0, 8]
  made = claims.balance_lengths(pairs := [pair(*each) for each in lengths])
  assert made == balanced_by_loop(pairs)
  assert 0 < len(made[0]) < 30


# Best of n.


def test_self_reward_by_hand():
  # 0.5 * (-2 + 6) / 4 and 0.5 * (-9 + 6) / 3.
  made = claims.compute_self_rewards(
    np.array([-2.0, -9.0]), np.array([-6.0, -6.0]), np.array([4, 3]), beta=0.5
  )
  np.testing.assert_allclose(made, [0.5, -0.5])


def test_self_reward_without_lengths_prefers_the_short():
  # Each token of the policy's is a little less likely than of the reference's, that
  # of the long answer least so.
  lengths = np.array([5, 50])
  logps, ref = np.array([-1.0, -4.0]), np.array([-0.5, -1.0])
  by_token = claims.compute_self_rewards(logps, ref, lengths)
  whole = claims.compute_self_rewards(logps, ref, np.ones(2, int))
  assert (by_token.argmax(), whole.argmax()) == (1, 0)


def test_self_reward_never_takes_an_empty_answer():
  made = claims.compute_self_rewards(
    np.array([-3.0, 0.0]), np.array([-2.0, 0.0]), np.array([4, 0])
  )
  assert made.argmax() == 0


def test_self_reward_takes_groups():
  logps = np.array([[-1.0, -2.0], [-4.0, -3.0]])
  made = claims.compute_self_rewards(logps, np.full((2, 2), -2.0), np.ones((2, 2), int))
  assert made.argmax(axis=1).tolist() == [0, 1]
