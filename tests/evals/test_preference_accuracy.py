"""Choices read from what judges say, and how often they agree with preferences."""

from vlmrlaif_jax.evals import preference_accuracy
from vlmrlaif_jax.evals.bootstrap import Resampling

HOW = Resampling(list("aabbccdd"), seed=0, resamples=200)
BETTER = [1, 2, 1, 2, 1, 2, 1, 2]


def test_the_higher_score_is_the_choice():
  scores = [(8.0, 4.0), (4.0, 8.0), (5.0, 5.0), None]
  assert list(map(preference_accuracy.choice_of_scores, scores)) == [1, 2, 0, None]


def test_shares_are_of_all_pairs():
  found = preference_accuracy.measure([1, 2, 1, 1, 0, 0, None, 2], BETTER, HOW)
  mean = {name: stats["mean"] for name, stats in found.items()}
  assert (mean["accuracy"], mean["tied"], mean["unread"]) == (4 / 8, 2 / 8, 1 / 8)
  assert found["accuracy"]["low"] <= 0.5 <= found["accuracy"]["high"]
  assert found["accuracy"]["n"] == 8


def test_slot_bias_is_of_who_chooses():
  bias = lambda choices: preference_accuracy.measure(choices, BETTER, HOW)["slot_bias"][
    "mean"
  ]
  assert bias([1] * 8) == 0.5
  assert bias([2] * 8) == -0.5
  assert bias(BETTER) == 0
  # Chooses twice, both times the first, which is the better once.
  assert bias([1, 1, 0, 0, None, None, 0, 0]) == 0.5


def test_who_never_chooses_has_no_slot_bias():
  assert "slot_bias" not in preference_accuracy.measure([None] * 8, BETTER, HOW)


def test_a_difference_is_of_accuracies_on_the_same_pairs():
  choices = {"one": [1] * 8, "none": [None] * 8, "all": BETTER}
  found = preference_accuracy.differences(choices, BETTER, HOW, of="all")
  assert {name: stats["mean"] for name, stats in found.items()} == {
    "one": 0.5,
    "none": 1.0,
  }
