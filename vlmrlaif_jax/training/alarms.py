"""What goes wrong while a stage trains, told from its metrics.

An alarm is raised once, when what it speaks of begins; again only after that has been
over for as many lines of metrics as a mean is taken of.

Alarms follow from the lines of metrics.jsonl and nothing else: a run that goes on reads
there what it had raised, and every process raises the same.
"""

import math
import pathlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from ml_collections import ConfigDict

from vlmrlaif_jax.core.errors import check_at_least, check_choices, subsection
from vlmrlaif_jax.core.jsonl import read_jsonl, write_records
from vlmrlaif_jax.core.stage_log import StageLog

EXIT_ALARM = 3  # The exit code of a run that an alarm has ended.
MIN_CERTAINTY = 3.0  # Standard errors of a difference that is no chance.
LEARNING_METRICS = 0.98  # Accuracy of a reward model that has nothing left to learn.
FILE = "alarms.jsonl"
NO_METRICS = ("step", "time", "phases")  # What else is in a line of metrics.jsonl.

# The values of each metric, in the order of the lines.
MetricHistory: TypeAlias = Mapping[str, list[float]]
RuleResult: TypeAlias = tuple[
  bool, str
]  # Whether it holds now, and what does, in words.


class Alarm(NamedTuple):
  """What went wrong, from which step on, and what to do about it."""

  step: int
  name: str  # A key of RULES.
  message: str
  remedy: str


class Alarmed(Exception):
  """A run that an alarm has ended, as its config wants."""


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      stop=("nan",),  # Alarms, keys of RULES, that end the run; the others warn.
      window=10,  # Lines of metrics in a mean; the first so many are compared with.
      kl=0.3,  # Nats a token from the reference, either way.
      clip=0.5,  # Of tokens whose ratio has left the clipping range.
      gap=0.1,  # Nats a token between sampler and trainer.
      length=2.0,  # Times longer, or shorter, than at first.
      eos=0.2,  # By which the share of answers that end falls.
      truth=0.05,  # By which what is right falls while the reward does not.
      truths=("truth", "met_reference"),  # Metrics that say what is right.
      chosen=1.0,  # By which DPO's reward of chosen answers falls below 0.
      held_out=0.55,  # Accuracy on held-out pairs with all others learned.
    )
  )


# What is not known yet is NaN, of which nothing holds.


def _nan(history: MetricHistory, config: ConfigDict) -> RuleResult:
  wrong = {name: x[-1] for name, x in history.items() if not math.isfinite(x[-1])}
  return bool(wrong), ", ".join(f"{name} is {x}" for name, x in wrong.items())


def _kl(history: MetricHistory, config: ConfigDict) -> RuleResult:
  kl = _last(history, "kl", config.window)
  each = kl / max(_last(history, "length", config.window), 1.0)
  said = f"the KL to the reference is {each:.2g} nats a token ({kl:.3g} an answer)"
  return abs(each) > config.kl, said


def _clip(history: MetricHistory, config: ConfigDict) -> RuleResult:
  share = _last(history, "clip_fraction", config.window)
  said = f"an update takes {share:.0%} of the tokens out of the clipping range"
  return share > config.clip, said


def _gap(history: MetricHistory, config: ConfigDict) -> RuleResult:
  gap = _last(history, "sampler_gap", config.window)
  return gap > config.gap, (
    f"sampler and trainer differ by {gap:.2g} nats a token about the same answers of "
    "the same policy"
  )


def _length(history: MetricHistory, config: ConfigDict) -> RuleResult:
  first, last = _both(history, "length", config.window)
  said = f"answers were {first:.3g} tokens long at first and are {last:.3g} now"
  return max(first, last) > config.length * min(first, last), said


def _eos(history: MetricHistory, config: ConfigDict) -> RuleResult:
  first, last = _both(history, "stop_rate", config.window)
  said = f"{first:.0%} of the answers came to an end at first and {last:.0%} do now"
  return first - last > config.eos, said


def _truth(history: MetricHistory, config: ConfigDict) -> RuleResult:
  before, now = _both(history, "reward", config.window)
  kept = not _fall(history, "reward", config.window) > MIN_CERTAINTY
  for name in config.truths:
    first, last = _both(history, name, config.window)
    fell = (
      first - last > config.truth
      and _fall(history, name, config.window) > MIN_CERTAINTY
    )
    if kept and fell:
      return True, (
        f"{name} fell from {first:.2f} to {last:.2f} while the reward went from "
        f"{before:.3g} to {now:.3g}"
      )
  return False, ""


def _chosen(history: MetricHistory, config: ConfigDict) -> RuleResult:
  first, last = _both(history, "margin", config.window)
  chosen = _last(history, "chosen_reward", config.window)
  return chosen < -config.chosen and last > first, (
    f"the margin grew from {first:.2g} to {last:.2g} while chosen answers lost "
    f"{-chosen:.2g} (beta x nats): both are unlearned, the rejected ones faster"
  )


def _held_out(history: MetricHistory, config: ConfigDict) -> RuleResult:
  held = _last(history, "held_out_accuracy", 1)
  learned = _last(history, "accuracy", config.window)
  return held <= config.held_out and learned >= LEARNING_METRICS, (
    f"{learned:.0%} of the pairs are ranked right, and of those held out {held:.0%}, "
    "which is chance"
  )


class AlarmRule(NamedTuple):
  """When an alarm is raised, and which settings of the stage there are against it."""

  says: Callable[[MetricHistory, ConfigDict], RuleResult]
  remedy: str


RULES = {
  "nan": AlarmRule(
    _nan,
    "lower optimizer.learning_rate or optimizer.clip_norm, or set model.dtype=float32; "
    "updates whose gradient is not finite are left out",
  ),
  "kl": AlarmRule(_kl, "raise kl_coef, or lower optimizer.learning_rate or epochs"),
  "clip": AlarmRule(_clip, "lower optimizer.learning_rate, epochs or minibatches"),
  "gap": AlarmRule(
    _gap,
    "set model.dtype=float32 and model.attention=xla: if the gap stays, the model "
    "decodes other than it reads, which no setting mends",
  ),
  "length": AlarmRule(
    _length,
    "look at the samples; set length_coef against what the reward favours, or raise "
    "kl_coef",
  ),
  "eos": AlarmRule(
    _eos, "raise data.response_len, set stop_penalty further below 0, or raise kl_coef"
  ),
  "truth": AlarmRule(
    _truth,
    "take the checkpoint before it; raise kl_coef, lower steps, or label more "
    "preferences for the reward model (rm)",
  ),
  "chosen": AlarmRule(
    _chosen, "raise sft_coef or beta, or lower optimizer.learning_rate or steps"
  ),
  "held_out": AlarmRule(
    _held_out,
    "label more prompts (label), lower steps or optimizer.learning_rate, or raise "
    "optimizer.weight_decay",
  ),
}


class AlarmRules:
  """Tells from one line of metrics after the other which alarms begin."""

  def __init__(self, config: ConfigDict):
    check(config)
    self.config = config
    self.history: dict[str, list[float]] = {}
    self._quiet: dict[str, float] = defaultdict(lambda: math.inf)  # Lines since.

  def see(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
    """The alarms that begin with the metrics of a step."""
    for name, x in metrics.items():
      self.history.setdefault(name, []).append(x)
    begun = []
    for name, rule in RULES.items():
      holds, message = rule.says(self.history, self.config)
      if holds and self._quiet[name] >= self.config.window:
        begun.append(Alarm(step, name, message, rule.remedy))
      self._quiet[name] = 0 if holds else self._quiet[name] + 1
    return begun

  def holding(self) -> list[str]:
    """The alarms whose reason is there now."""
    return [name for name in RULES if self._quiet[name] == 0]


class AlarmLog:
  """The alarms of a stage, which go to alarms.jsonl and to the screen.

  Args:
    last: the step that the run goes on from; what was raised until then stays.
  """

  def __init__(self, config: ConfigDict, log: StageLog, last: int):
    self._watcher, self._log, self._path = AlarmRules(config), log, log.folder / FILE
    self._raised: list[Alarm] = []
    for step, metrics in read_logged_metrics(log.folder / "metrics.jsonl", last):
      self._raised += self._watcher.see(step, metrics)
    if self._path.exists():
      self._write()

  def look(self, step: int, metrics: Mapping[str, float]) -> str:
    """Raises the alarms that begin, and says which hold, for the progress line.

    Raises:
      Alarmed: one of them is to end the run.
    """
    begun, stage = self._watcher.see(step, metrics), self._log.stage
    for _, name, said, remedy in begun:
      self._log.print_note(f"{stage}: ALARM {name} at step {step}: {said}; {remedy}")
    if begun:
      self._raised += begun
      self._write()
    for _, name, said, remedy in begun:
      if name in self._watcher.config.stop:
        raise Alarmed(
          f"{stage} was stopped at step {step} by the alarm {name}: {said}. Against "
          f"it: {remedy}. With other settings the stage begins anew: remove "
          f"{self._log.folder} first. To go on all the same from its last checkpoint, "
          f"take {name} out of alarms.stop in the stage's section"
        )
    holding = self._watcher.holding()
    return f"ALARM {' '.join(holding)}" if holding else ""

  def _write(self) -> None:
    if self._log.writes:
      write_records(self._path, [alarm._asdict() for alarm in self._raised])


def read_logged_metrics(
  path: pathlib.Path, last: int
) -> list[tuple[int, dict[str, float]]]:
  """(step, metrics) of each line of a metrics.jsonl up to a step."""
  found = []
  for row in read_jsonl(path) if path.exists() else []:
    # Values that are not finite were written as null.
    values = {k: math.nan if x is None else x for k, x in row.items()}
    if row["step"] <= last:
      numbers = {k: x for k, x in values.items() if k not in NO_METRICS}
      found.append((row["step"], numbers))
  return found


def check(config: ConfigDict) -> None:
  """Checks the settings of the alarms.

  Raises:
    ValueError: a value is wrong. The message starts with "alarms.".
  """
  with subsection("alarms"):
    check_choices(config, {"stop": RULES})
    check_at_least(config, {"window": 2})


def _last(history: MetricHistory, name: str, window: int) -> float:
  """The mean of the last so many values; NaN if there is none."""
  part = history.get(name, [])[-window:]
  return sum(part) / len(part) if part else math.nan


def _both(history: MetricHistory, name: str, window: int) -> tuple[float, float]:
  """The means of the first and of the last so many; NaN while these overlap."""
  values = history.get(name, [])
  if len(values) < 2 * window:
    return math.nan, math.nan
  return sum(values[:window]) / window, _last(history, name, window)


def _fall(history: MetricHistory, name: str, window: int) -> float:
  """By how many standard errors the mean has fallen (Welch's t)."""
  first, last = _both(history, name, window)
  values = history.get(name, [])
  square = sum((x - first) ** 2 for x in values[:window])
  square += sum((x - last) ** 2 for x in values[-window:])
  return (first - last) / math.sqrt(max(square / (window - 1) / window, 1e-12))
