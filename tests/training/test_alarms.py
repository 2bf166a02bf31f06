"""Alarms, over series of metrics made by hand; windows are of three lines."""

import re

import pytest

from tests.helpers import small
from vlmrlaif_jax.training import alarms


def raised(settings=None, **series):
  """(step, name) of each alarm, from the values of metrics line by line."""
  config = alarms.default_config()
  config.update({"window": 3, **(settings or {})})
  watcher, found = alarms.AlarmRules(config), []
  for step, values in enumerate(zip(*series.values(), strict=True), 1):
    found += watcher.update(step, dict(zip(series, values, strict=True)))
  return [(alarm.step, alarm.name) for alarm in found]


def said(settings=None, **series):
  """The message of the one alarm that the last line raises."""
  config = alarms.default_config()
  config.update({"window": 3, **(settings or {})})
  watcher = alarms.AlarmRules(config)
  for step, values in enumerate(zip(*series.values(), strict=True), 1):
    begun = watcher.update(step, dict(zip(series, values, strict=True)))
  (alarm,) = begun
  return alarm.message


@pytest.mark.parametrize("x", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_at_once(x):
  assert raised(loss=[1.0, x], grad_norm=[1.0, 1.0]) == [(2, "nan")]
  assert said(loss=[1.0, x], grad_norm=[1.0, 1.0]) == f"loss is {x}"


def test_an_update_of_many_times_the_params_is_told_of_at_once():
  assert raised(update_ratio=[0.01, 5.0]) == []
  assert raised(update_ratio=[0.01, 50.0]) == [(2, "jump")]


def test_responses_that_are_empty_twice_are_told_of():
  ends = [1.0, 1.0, 1.0]
  assert (3, "empty") in raised(length=[9.0, 1.0, 1.0], stop_rate=ends)
  assert raised(length=[9.0, 1.0], stop_rate=[1.0, 1.0]) == []
  assert (
    raised(length=[1.0, 1.0], stop_rate=[0.5, 0.5]) == []
  )  # One token is the limit.
  assert raised(length=[0.0, 0.0], stop_rate=[0.0, 0.0]) == []  # None has a score.


def test_rewards_that_are_equal_twice_are_told_of():
  assert raised(reward_std=[0.0, 0.3, 0.0]) == []
  assert raised(reward_std=[0.3, 0.0, 1e-8]) == [(3, "flat")]


def test_groups_that_are_all_tied_twice_are_told_of():
  differ = dict(reward_std=[0.3, 0.3])  # Between the groups.
  assert raised(tied=[1.0, 0.8], **differ) == []
  assert raised(tied=[1.0, 1.0], **differ) == [(2, "flat")]


def test_kl_is_told_by_the_token():
  assert raised(kl=[0.0, 2.0], length=[10.0, 10.0]) == []
  assert raised(kl=[0.0, 20.0], length=[10.0, 10.0]) == [(2, "kl")]
  assert raised(kl=[0.0, 20.0], length=[100.0, 100.0]) == []


def test_a_kl_below_zero_is_told_of():
  assert raised(kl=[0.0, -20.0], length=[10.0, 10.0]) == [(2, "kl")]


def test_an_update_that_is_clipped_nearly_everywhere_is_told_of():
  assert raised(clip_fraction=[0.1, 0.3]) == []
  assert raised(clip_fraction=[0.1, 0.95]) == [(2, "clip")]


def test_a_gap_between_sampler_and_trainer_is_told_of():
  assert raised(sampler_gap=[1e-6, 0.02]) == []
  assert raised(sampler_gap=[0.5]) == [(1, "gap")]
  assert raised(sampler_gap=[0.5], staleness=[1.0]) == []


@pytest.mark.parametrize("last", [25.0, 4.0])
def test_lengths_that_drift_are_told_of_once_two_windows_are_there(last):
  assert raised(length=[10.0] * 3 + [last] * 2) == []
  assert raised(length=[10.0] * 3 + [last] * 3) == [(6, "length")]
  assert raised(length=[10.0] * 3 + [15.0] * 3) == []


def test_answers_that_no_longer_end_are_told_of():
  assert raised(stop_rate=[1.0] * 3 + [0.9] * 3) == []
  assert raised(stop_rate=[1.0] * 3 + [0.5] * 3) == [(6, "eos")]
  assert raised(stop_rate=[0.2] * 3 + [1.0] * 3) == []


TRUE, FALSE = [0.6, 0.62, 0.58], [0.4, 0.42, 0.38]  # 0.2 is twelve standard errors.
LOW, HIGH = [1.0, 1.1, 0.9], [2.0, 2.1, 1.9]


def test_truth_that_falls_while_the_reward_rises_is_told_of():
  assert raised(truth=TRUE + FALSE, reward=LOW + HIGH) == [(6, "truth")]
  assert said(truth=TRUE + FALSE, reward=LOW + HIGH) == (
    "truth fell from 0.60 to 0.40 while the reward changed from 1 to 2"
  )


def test_truth_that_rises_with_the_reward_is_no_alarm():
  assert raised(truth=FALSE + TRUE, reward=LOW + HIGH) == []


def test_truth_that_falls_with_the_reward_is_no_reward_hacking():
  assert raised(truth=TRUE + FALSE, reward=HIGH + LOW) == []


def test_truth_that_falls_by_chance_is_no_alarm():
  wide = [0.3, 0.9, 0.6], [0.1, 0.7, 0.4]  # The same 0.2, within its noise.
  assert raised(truth=wide[0] + wide[1], reward=LOW + HIGH) == []


def test_another_judge_may_say_what_is_right():
  series = dict(judged=TRUE + FALSE, reward=LOW + HIGH)
  assert raised(**series) == []
  assert raised(dict(truths=("judged",)), **series) == [(6, "truth")]


def test_chosen_answers_that_are_unlearned_with_the_rejected_are_told_of():
  margin = [0.1] * 3 + [2.0] * 3
  assert raised(margin=margin, chosen_reward=[0.0] * 3 + [-3.0] * 3) == [(6, "chosen")]
  assert raised(margin=margin, chosen_reward=[0.0] * 3 + [0.5] * 3) == []


def test_a_policy_that_dpo_ruins_is_told_of_and_an_anchored_one_is_not():
  # The embedded world, 160 steps at 5e-4: means of ten lines, every 40 steps.
  steps = lambda *means: [mean for mean in means for _ in range(3)]
  margin = steps(0.02, 0.68, 1.25, 1.5, 1.48)
  ruined = steps(0.0, -0.14, -0.14, -0.27, -0.31)
  anchored = steps(0.01, 0.06, 0.09, 0.1, 0.11)  # With dpo.sft_coef=0.1.
  assert [name for _, name in raised(margin=margin, chosen_reward=ruined)] == ["chosen"]
  assert raised(margin=margin, chosen_reward=anchored) == []
  worse = steps(0.0, -0.49)  # Answers 65 % of the questions right, instead of 82 %.
  assert raised(margin=margin[:6], chosen_reward=worse) == [(6, "chosen")]


def test_a_reward_model_that_learned_by_heart_is_told_of():
  held, good = [0.5] * 4, [0.8] * 4
  assert raised(accuracy=[1.0] * 4, held_out_accuracy=held) == [(1, "held_out")]
  assert raised(accuracy=[1.0] * 4, held_out_accuracy=good) == []
  assert raised(accuracy=[0.6] * 4, held_out_accuracy=held) == []


def test_a_judge_that_fails_more_often_than_it_may_is_told_of_at_once():
  assert raised(failed_queries=[0.0, 0.1], failed_above_max=[0.0, 0.0]) == []
  failing = dict(failed_queries=[0.0, 0.5], failed_above_max=[0.0, 0.25])
  assert raised(**failing) == [(2, "judge")]
  assert said(**failing) == (
    "50% of the queries to the judge failed in the last batch, more than "
    "endpoint.max_failed=0.25"
  )


# Once per onset.


def test_an_alarm_is_raised_once_while_it_holds():
  assert raised(clip_fraction=[0.9] * 50) == [(1, "clip")]


def test_it_is_raised_again_after_a_window_without_it():
  gone = lambda count: [5.0, *[0.0] * count, 5.0]
  settings = dict(window=2, gap=2.0)
  # A mean of two holds it for a line more, so that 3 lines give it two quiet ones.
  assert raised(settings, sampler_gap=gone(3)) == [(1, "gap"), (5, "gap")]
  assert raised(settings, sampler_gap=gone(2)) == [(1, "gap")]


def test_what_holds_now_is_known():
  watcher = alarms.AlarmRules(alarms.default_config())
  watcher.update(1, {"clip_fraction": 0.9, "loss": float("nan")})
  assert watcher.list_active() == ["nan", "clip"]
  watcher.update(2, {"clip_fraction": 0.9, "loss": 1.0})
  assert watcher.list_active() == ["clip"]


@pytest.mark.parametrize(
  "settings, told",
  [
    (dict(stop=("nan", "klx")), r"alarms.stop .*'klx'"),
    (dict(window=1), "alarms.window must be 2 or more, not 1"),
  ],
)
def test_settings_without_a_meaning_are_refused(settings, told):
  with pytest.raises(ValueError, match=told):
    raised(settings)


@pytest.mark.parametrize("name", alarms.RULES)
def test_a_remedy_names_settings_that_there_are(name):
  config = small.all_sections()
  parts = [config, *(config[s] for s in ("sft", "rm", "ppo", "grpo", "dpo"))]
  found = re.findall(r"\w+_\w+|\w+\.\w+", alarms.RULES[name].remedy)
  known = lambda key: any(
    key in part or key.partition(".")[2] in part.get(key.partition(".")[0], {})
    for part in parts
  )
  assert found and [key for key in found if not known(key)] == []
