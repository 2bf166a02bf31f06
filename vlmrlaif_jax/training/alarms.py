"""Alarms: problems of a training run that its metrics show.

An alarm is raised when its condition becomes true. It can be raised again only after
the condition has been false for `window` consecutive lines of metrics.

Alarms depend on the lines of metrics.jsonl alone. A resumed run therefore reads its
past alarms from that file, and every process raises the same alarms.
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

EXIT_ALARM = 3  # The exit code of a run that an alarm has stopped.
MIN_CERTAINTY = 3.0  # Standard errors of a significant difference.
MIN_TRAIN_ACCURACY = 0.98  # Training accuracy of a reward model that has converged.
FEW_LINES = 2  # Lines of metrics after which empty or equal values are no chance.
MIN_SPREAD = 1e-6  # Standard deviation of equal rewards, because of rounding.
FILE = "alarms.jsonl"
NO_METRICS = ("step", "time", "phases")  # Keys of metrics.jsonl that are no metrics.

# The values of each metric, in the order of the lines.
MetricHistory: TypeAlias = Mapping[str, list[float]]
# Whether the condition is true, and a description of it.
RuleResult: TypeAlias = tuple[bool, str]


class Alarm(NamedTuple):
  """A problem, the step at which it was detected, and a remedy."""

  step: int
  name: str  # A key of RULES.
  message: str  # Description with values.
  remedy: str


class AlarmError(Exception):
  """Raised when an alarm listed in `alarms.stop` starts."""


def default_config() -> ConfigDict:
  """Returns the default settings of the alarms."""
  return ConfigDict(
    dict(
      # Alarms (keys of RULES) that stop the run; the others warn.
      stop=("nan", "jump"),
      window=10,  # Lines of metrics in a mean. At least 2.
      jump=10.0,  # Maximum norm of an update, relative to that of the parameters.
      kl=0.3,  # Maximum KL to the reference, in nats per token.
      clip=0.5,  # Maximum share of tokens outside the clipping range.
      gap=0.1,  # Maximum log-prob difference of sampler and trainer, nats/token.
      length=2.0,  # Maximum ratio of first and last mean response length.
      eos=0.2,  # Maximum fall of the share of responses with EOS.
      truth=0.05,  # Maximum fall of accuracy while the reward does not fall.
      truths=("truth", "met_reference"),  # Metrics of accuracy.
      chosen=0.2,  # Maximum fall below 0 of DPO's reward of chosen answers.
      held_out=0.55,  # Minimum accuracy on held-out pairs.
    )
  )


# A metric without values is NaN. Comparisons with NaN are false, so no alarm starts.


def _check_nan(history: MetricHistory, config: ConfigDict) -> RuleResult:
  wrong = {name: x[-1] for name, x in history.items() if not math.isfinite(x[-1])}
  return bool(wrong), ", ".join(f"{name} is {x}" for name, x in wrong.items())


def _check_jump(history: MetricHistory, config: ConfigDict) -> RuleResult:
  ratio = _average_last(history, "update_ratio", 1)
  message = f"an update changed the parameters by {ratio:.2g} times their norm"
  return ratio > config.jump, message


def _check_empty(history: MetricHistory, config: ConfigDict) -> RuleResult:
  lengths = history.get("length", [])[-FEW_LINES:]
  ended = history.get("stop_rate", [])[-FEW_LINES:]
  is_empty = len(lengths) == FEW_LINES and all(0 < x <= 1 for x in lengths)
  return is_empty and min(ended, default=0.0) >= 1, (
    f"all responses of the last {FEW_LINES} lines of metrics are empty"
  )


def _check_flat(history: MetricHistory, config: ConfigDict) -> RuleResult:
  shares = history.get("tied", [])[-FEW_LINES:]
  spreads = history.get("reward_std", [])[-FEW_LINES:]
  if shares:  # Groups are compared within themselves.
    is_flat = len(shares) == FEW_LINES and min(shares) >= 1
    rewards = "the rewards of each group"
  else:
    is_flat = len(spreads) == FEW_LINES and max(spreads) <= MIN_SPREAD
    rewards = "all rewards"
  return is_flat, (
    f"{rewards} were equal in the last {FEW_LINES} lines of metrics, so that the "
    "policy learns nothing from them"
  )


def _check_kl(history: MetricHistory, config: ConfigDict) -> RuleResult:
  kl = _average_last(history, "kl", config.window)
  per_token = kl / max(_average_last(history, "length", config.window), 1.0)
  message = (
    f"the KL to the reference is {per_token:.2g} nats per token ({kl:.3g} per response)"
  )
  return abs(per_token) > config.kl, message


def _check_clip(history: MetricHistory, config: ConfigDict) -> RuleResult:
  share = _average_last(history, "clip_fraction", config.window)
  message = f"{share:.0%} of the tokens are outside the clipping range"
  return share > config.clip, message


def _check_gap(history: MetricHistory, config: ConfigDict) -> RuleResult:
  gap = _average_last(history, "sampler_gap", config.window)
  # Rollouts of an older policy differ by more than rounding.
  is_old = _average_last(history, "staleness", config.window) > 0
  return gap > config.gap and not is_old, (
    f"sampler and trainer differ by {gap:.2g} nats per token for the same responses "
    "of the same policy"
  )


def _check_length(history: MetricHistory, config: ConfigDict) -> RuleResult:
  first, last = _average_ends(history, "length", config.window)
  message = f"the mean response length changed from {first:.3g} to {last:.3g} tokens"
  return max(first, last) > config.length * min(first, last), message


def _check_eos(history: MetricHistory, config: ConfigDict) -> RuleResult:
  first, last = _average_ends(history, "stop_rate", config.window)
  message = f"the share of responses with EOS fell from {first:.0%} to {last:.0%}"
  return first - last > config.eos, message


def _check_truth(history: MetricHistory, config: ConfigDict) -> RuleResult:
  before, now = _average_ends(history, "reward", config.window)
  is_reward_stable = not _compute_fall(history, "reward", config.window) > MIN_CERTAINTY
  for name in config.truths:
    first, last = _average_ends(history, name, config.window)
    has_fallen = (
      first - last > config.truth
      and _compute_fall(history, name, config.window) > MIN_CERTAINTY
    )
    if is_reward_stable and has_fallen:
      return True, (
        f"{name} fell from {first:.2f} to {last:.2f} while the reward changed from "
        f"{before:.3g} to {now:.3g}"
      )
  return False, ""


def _check_chosen(history: MetricHistory, config: ConfigDict) -> RuleResult:
  first, last = _average_ends(history, "margin", config.window)
  chosen = _average_last(history, "chosen_reward", config.window)
  return chosen < -config.chosen and last > first, (
    f"the margin grew from {first:.2g} to {last:.2g} while the reward of chosen "
    f"answers fell to {chosen:.2g} (beta x nats): both log-probabilities fall"
  )


def _check_held_out(history: MetricHistory, config: ConfigDict) -> RuleResult:
  accuracy = _average_last(history, "held_out_accuracy", 1)
  train_accuracy = _average_last(history, "accuracy", config.window)
  return accuracy <= config.held_out and train_accuracy >= MIN_TRAIN_ACCURACY, (
    f"accuracy is {train_accuracy:.0%} on training pairs and {accuracy:.0%} on "
    "held-out pairs, which is chance"
  )


def _check_judge(history: MetricHistory, config: ConfigDict) -> RuleResult:
  share = _average_last(history, "failed_queries", 1)
  above = _average_last(history, "failed_above_max", 1)
  return above > 0, (
    f"{share:.0%} of the queries to the judge failed in the last batch, more than "
    f"endpoint.max_failed={share - above:.2g}"
  )


class AlarmRule(NamedTuple):
  """The condition of an alarm, and the settings that help."""

  check: Callable[[MetricHistory, ConfigDict], RuleResult]
  remedy: str  # Settings of the stage to change.


RULES = {
  "nan": AlarmRule(
    _check_nan,
    "lower optimizer.learning_rate or optimizer.clip_norm, or set model.dtype=float32; "
    "updates with a gradient that is not finite are skipped",
  ),
  "jump": AlarmRule(
    _check_jump, "lower optimizer.learning_rate, or raise optimizer.warmup_steps"
  ),
  "empty": AlarmRule(
    _check_empty,
    "use a checkpoint from before this step; read the samples, correct what "
    "reward.terms favor, or raise kl_coef",
  ),
  "flat": AlarmRule(
    _check_flat,
    "check that reward.terms, or the judge, distinguish the sampled answers; raise "
    "temperature, batch_size or samples",
  ),
  "kl": AlarmRule(
    _check_kl, "raise kl_coef, or lower optimizer.learning_rate or epochs"
  ),
  "clip": AlarmRule(
    _check_clip, "lower optimizer.learning_rate, epochs or minibatches"
  ),
  "gap": AlarmRule(
    _check_gap,
    "set model.dtype=float32 and model.attention=xla; if the gap stays, decoding and "
    "the forward pass of the model disagree, and no setting helps",
  ),
  "length": AlarmRule(
    _check_length,
    "read the samples; weight the term length in reward.terms against the length that "
    "the reward favors, or raise kl_coef",
  ),
  "eos": AlarmRule(
    _check_eos,
    "raise data.response_len, weight the term stop in reward.terms further below 0, or "
    "raise kl_coef",
  ),
  "truth": AlarmRule(
    _check_truth,
    "use the checkpoint before this step; raise kl_coef, lower steps, or label more "
    "preferences for the reward model (rm)",
  ),
  "chosen": AlarmRule(
    _check_chosen, "raise sft_coef or beta, or lower optimizer.learning_rate or steps"
  ),
  "held_out": AlarmRule(
    _check_held_out,
    "label more prompts (label), lower steps or optimizer.learning_rate, or raise "
    "optimizer.weight_decay",
  ),
  "judge": AlarmRule(
    _check_judge,
    'read the reasons in the lines above that start with "judge:"; correct the server '
    "or the settings of oracle.endpoint",
  ),
}


class AlarmRules:
  """The conditions of all alarms, updated with one line of metrics at a time.

  Attributes:
    config: Settings; see default_config.
    history: The values of each metric so far.
  """

  def __init__(self, config: ConfigDict):
    check(config)
    self.config = config
    self.history: dict[str, list[float]] = {}
    # Lines since each condition was true.
    self._quiet: dict[str, float] = defaultdict(lambda: math.inf)

  def update(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
    """Adds the metrics of a step and returns the alarms that start."""
    for name, x in metrics.items():
      self.history.setdefault(name, []).append(x)
    started = []
    for name, rule in RULES.items():
      is_true, message = rule.check(self.history, self.config)
      if is_true and self._quiet[name] >= self.config.window:
        started.append(Alarm(step, name, message, rule.remedy))
      self._quiet[name] = 0 if is_true else self._quiet[name] + 1
    return started

  def list_active(self) -> list[str]:
    """Returns the alarms whose conditions are true now."""
    return [name for name in RULES if self._quiet[name] == 0]


class AlarmLog:
  """The alarms of a stage, written to alarms.jsonl and to the terminal.

  Args:
    config: Settings; see default_config.
    log: Log of the stage.
    last: Step that the run resumes from. Earlier alarms are restored.
  """

  def __init__(self, config: ConfigDict, log: StageLog, last: int):
    self._rules, self._log, self._path = AlarmRules(config), log, log.folder / FILE
    self._raised: list[Alarm] = []
    for step, metrics in read_logged_metrics(log.folder / "metrics.jsonl", last):
      self._raised += self._rules.update(step, metrics)
    if self._path.exists():
      self._write()

  def update(self, step: int, metrics: Mapping[str, float]) -> str:
    """Adds the metrics of a step and logs the alarms that start.

    Returns:
      The active alarms for the progress line, "" without any.

    Raises:
      AlarmError: An alarm that starts is one of `alarms.stop`.
    """
    started, stage = self._rules.update(step, metrics), self._log.stage
    for _, name, message, remedy in started:
      self._log.print_note(f"{stage}: ALARM {name} at step {step}: {message}; {remedy}")
    if started:
      self._raised += started
      self._write()
    for _, name, message, remedy in started:
      if name in self._rules.config.stop:
        raise AlarmError(
          f"{stage} was stopped at step {step} by the alarm {name}: {message}. Remedy: "
          f"{remedy}. To train the stage again with other settings, remove "
          f"{self._log.folder} first. To resume from its last checkpoint all the same, "
          f"remove {name} from alarms.stop in the stage's section of the config"
        )
    active = self._rules.list_active()
    return f"ALARM {' '.join(active)}" if active else ""

  def _write(self) -> None:
    if self._log.writes:
      write_records(self._path, [alarm._asdict() for alarm in self._raised])


def read_logged_metrics(
  path: pathlib.Path, last: int
) -> list[tuple[int, dict[str, float]]]:
  """Returns the step and the metrics of each line up to step `last`."""
  rows = []
  for row in read_jsonl(path) if path.exists() else []:
    # The log writes values that are not finite as null.
    values = {k: math.nan if x is None else x for k, x in row.items()}
    if row["step"] <= last:
      numbers = {k: x for k, x in values.items() if k not in NO_METRICS}
      rows.append((row["step"], numbers))
  return rows


def check(config: ConfigDict) -> None:
  """Checks the settings of the alarms.

  Raises:
    ValueError: A value is invalid. The message starts with "alarms.".
  """
  with subsection("alarms"):
    check_choices(config, {"stop": RULES})
    check_at_least(config, {"window": 2})


def _average_last(history: MetricHistory, name: str, window: int) -> float:
  """Computes the mean of the last `window` values, NaN without values."""
  part = history.get(name, [])[-window:]
  return sum(part) / len(part) if part else math.nan


def _average_ends(
  history: MetricHistory, name: str, window: int
) -> tuple[float, float]:
  """Computes the means of the first and last `window` values, NaN if they overlap."""
  values = history.get(name, [])
  if len(values) < 2 * window:
    return math.nan, math.nan
  return sum(values[:window]) / window, _average_last(history, name, window)


def _compute_fall(history: MetricHistory, name: str, window: int) -> float:
  """Computes the fall of the mean in standard errors (Welch's t)."""
  first, last = _average_ends(history, name, window)
  values = history.get(name, [])
  square = sum((x - first) ** 2 for x in values[:window])
  square += sum((x - last) ** 2 for x in values[-window:])
  return (first - last) / math.sqrt(max(square / (window - 1) / window, 1e-12))
