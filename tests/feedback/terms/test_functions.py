"""Functions of terms: how they are found, called and given up."""

import asyncio
import threading
import time

import pytest

from tests.feedback.terms.samples import sample
from vlmrlaif_jax.feedback.terms import functions
from vlmrlaif_jax.feedback.terms.functions import Limits
from vlmrlaif_jax.feedback.terms.rules import REWARD_RULES

LIMITS = Limits(concurrency=2, timeout_s=5.0)
SAMPLES = [sample(id=f"v{i}", response="x" * i) for i in range(5)]


def measure(samples, *, factor=1.0):
  return [factor * len(each.response) for each in samples]


def values(function, samples=SAMPLES, limits=LIMITS):
  return [each.value for each in functions.call_function(function, samples, limits)]


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("def count(samples):\n  return [1.0] * len(samples)\n\nNUMBER = 3\n")
  return path


def test_a_function_is_loaded_from_a_file_a_module_or_by_its_name(file):
  load = lambda text: functions.load_function(text, REWARD_RULES)
  assert load(f"{file}:count")(SAMPLES) == [1.0] * 5
  assert load("vlmrlaif_jax.feedback.terms.rules:score_length")
  assert load("stop") is REWARD_RULES["stop"]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("none", "fn must be .*or one of stop, length.* not 'none'"),
    ("{file}:absent", "fn='.*mine.py:absent': .* defines no 'absent'"),
    ("{file}:NUMBER", "it is a int; give the name of a function"),
    ("nowhere.py:count", "nowhere.py cannot be imported .*No such file.*its path from"),
    ("no.such.module:count", "no.such.module cannot be imported"),
  ],
)
def test_a_function_that_is_not_there_is_named_with_a_remedy(file, text, message):
  with pytest.raises(ValueError, match=message):
    functions.load_function(text.format(file=file), REWARD_RULES)


def test_arguments_that_a_function_does_not_have_are_named():
  with pytest.raises(ValueError, match=r"fn='f': it must accept \(samples, scale=\)"):
    functions.bind_arguments(measure, "f", {"scale": 2})
  doubled = functions.bind_arguments(measure, "f", {"factor": 2})
  assert values(doubled) == [0, 2, 4, 6, 8]


def test_a_function_is_called_once_for_all_samples():
  calls = []
  assert values(lambda each: calls.append(len(each)) or measure(each)) == [
    0,
    1,
    2,
    3,
    4,
  ]
  assert calls == [5]


def test_a_sample_that_raises_is_invalid_alone():
  def divide(samples):
    return [1 / len(each.response) for each in samples]

  outcomes = functions.call_function(divide, SAMPLES, LIMITS)
  assert [each.value for each in outcomes] == [None, 1, 1 / 2, 1 / 3, 1 / 4]
  assert "ZeroDivisionError" in outcomes[0].failure and not outcomes[1].failure


def test_values_that_are_no_finite_numbers_are_invalid():
  results = iter([[None], [float("nan")], ["many"], [1, 2], [True]])
  one = lambda: functions.call_function(lambda _: next(results), SAMPLES[:1], LIMITS)[0]
  failures = [one().failure for _ in range(4)]
  assert "returned None" in failures[0] and "returned nan" in failures[1]
  assert "could not convert" in failures[2] and "2 values for 1 sample" in failures[3]
  assert one().value == 1.0


def test_an_async_function_is_called_concurrently_within_the_limit():
  now, most = 0, 0

  async def wait(samples):
    nonlocal now, most
    now += 1
    most = max(most, now)
    await asyncio.sleep(0.01)
    now -= 1
    if samples[0].id == "v3":
      raise RuntimeError("no answer")
    return measure(samples)

  outcomes = functions.call_function(wait, SAMPLES, LIMITS)
  assert [each.value for each in outcomes] == [0, 1, 2, None, 4]
  assert most == 2 and "no answer" in outcomes[3].failure


def test_a_call_that_takes_too_long_is_invalid():
  async def slow(samples):
    await asyncio.sleep(10 * (samples[0].id == "v1"))
    return measure(samples)

  limits = Limits(8, 0.2)
  assert values(slow, limits=limits) == [0, None, 2, 3, 4]
  released = threading.Event()
  start = time.monotonic()
  stuck = lambda each: released.wait(20) and measure(each)
  outcomes = functions.call_function(stuck, SAMPLES, limits)
  released.set()
  assert time.monotonic() - start < 10
  assert all("reward.timeout_s=0.2" in each.failure for each in outcomes)
