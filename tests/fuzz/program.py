"""Reads damaged inputs and checks that each is read, or refused by name.

    python -m tests.fuzz.program --seed=0

reads 300 videos, 400 data files, 150 checkpoints and 150 replies. It prints a table and
every finding, and exits with 1 if there is one. A finding is an exception that is no
message to the user, the death of a decoder, a hang, or a record that is lost without a
reason.
"""

import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from tests.fuzz import configs, rows, texts, videos
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.data import records, video
from vlmrlaif_jax.feedback.replies.lists import parse_list
from vlmrlaif_jax.feedback.replies.options import parse_choice, parse_yes_no
from vlmrlaif_jax.feedback.replies.rankings import parse_ranking
from vlmrlaif_jax.feedback.replies.scores import parse_boxed_scores, parse_score
from vlmrlaif_jax.feedback.replies.verdicts import parse_named_verdict, parse_verdict
from vlmrlaif_jax.huggingface import convert

_SEED = flags.DEFINE_integer("seed", 0, "Seed of the inputs.")
_SHARE = flags.DEFINE_float("share", 1.0, "Part of the inputs, between 0 and 1.")

COUNTS = {"videos": 300, "data files": 400, "checkpoints": 150, "replies": 150}
LIMIT_S = 60  # Seconds for one input.
LONGEST_REASON = 600  # Characters.
MESSAGES = (UserError, ValueError, FileNotFoundError)  # Errors for the user.


class Outcome(NamedTuple):
  """The results of one kind of input."""

  counts: Counter  # Inputs by "read", "refused" and "finding".
  findings: list[str]


@contextmanager
def _time_limit() -> Iterator[None]:
  def stop(*_):
    raise TimeoutError(f"no result within {LIMIT_S} s")

  signal.signal(signal.SIGALRM, stop)
  signal.alarm(LIMIT_S)
  try:
    yield
  finally:
    signal.alarm(0)


def _find_fault(reason: str) -> str:
  """Returns what is wrong with a reason; "" for a good one."""
  if not reason.strip():
    return "an empty reason"
  if len(reason) > LONGEST_REASON:
    return f"a reason of {len(reason)} characters"
  return ""


def _try(name: str, read: Callable[[], str], outcome: Outcome) -> None:
  """Counts an input; `read` returns the fault of its result, or ""."""
  kind, fault = "read", ""
  try:
    with _time_limit():
      fault = read()
  except MESSAGES as error:
    kind, fault = "refused", _find_fault(str(error))
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt):
      raise
    fault = f"{type(error).__name__}: {str(error)[:200]}"
  outcome.counts["finding" if fault else kind] += 1
  if fault:
    outcome.findings.append(f"{name}: {fault}")


def fuzz_videos(folder: Path, rng: random.Random, count: int) -> Outcome:
  """Decodes damaged videos in worker processes."""
  outcome = Outcome(Counter(), [])
  names, paths = zip(*videos.write_damaged(folder, rng, count), strict=True)
  results = video.read_videos(
    [str(path) for path in paths],
    video.Reading(video.ByCount(4), square=16),
    workers=2,
    timeout_s=float(LIMIT_S),
  )
  for name, result in zip(names, results, strict=True):
    if isinstance(result, video.Frames):
      outcome.counts["read"] += 1
      continue
    fault = _find_fault(result)
    if "the process died" in result or "no answer within" in result:
      fault = result
    outcome.counts["finding" if fault else "refused"] += 1
    if fault:
      outcome.findings.append(f"{name}: {fault}")
  return outcome


def fuzz_data_files(folder: Path, rng: random.Random, count: int) -> Outcome:
  """Reads damaged records and preferences."""
  outcome = Outcome(Counter(), [])
  (folder / "clip.mp4").touch()
  for path, has_preferences, total in rows.write_files(folder, rng, count):

    def read(path=path, has_preferences=has_preferences, total=total) -> str:
      reader = records.read_preferences if has_preferences else records.read_records
      examples, skipped = reader(path, videos=folder)
      if len(examples) + len(skipped) < total:
        return f"{total} rows, {len(examples)} read and {len(skipped)} skipped"
      return next(filter(None, (_find_fault(each.reason) for each in skipped)), "")

    _try(path.name, read, outcome)
  return outcome


def fuzz_checkpoints(folder: Path, rng: random.Random, count: int) -> Outcome:
  """Loads checkpoints with damaged configs."""
  outcome = Outcome(Counter(), [])
  for name, path in configs.write_damaged(folder, rng, count):

    def load(path=path) -> str:
      convert.load_checkpoint(
        path, dtype="float32", tower=str(folder / "whole" / "tower")
      )
      return ""

    _try(f"{path.name} ({name})", load, outcome)
  return outcome


PARSERS: dict[str, Callable[[str], Any]] = {
  "verdict": parse_verdict,
  "named verdict": lambda reply: parse_named_verdict(reply, "choice"),
  "score": lambda reply: parse_score(reply, high=5),
  "boxed scores": parse_boxed_scores,
  "list": parse_list,
  "yes or no": parse_yes_no,
  "option": lambda reply: parse_choice(reply, ("red", "blue", "a cat")),
  "ranking": lambda reply: parse_ranking(reply, 3),
}


def fuzz_replies(folder: Path, rng: random.Random, count: int) -> Outcome:
  """Parses random replies by every parser."""
  del folder
  outcome = Outcome(Counter(), [])
  for _ in range(count):
    reply = texts.make_reply(rng)

    def parse(reply: str = reply) -> str:
      for parser in PARSERS.values():
        parser(reply)
      return ""

    _try(f"{reply[:60]!r}", parse, outcome)
  return outcome


KINDS = {
  "videos": fuzz_videos,
  "data files": fuzz_data_files,
  "checkpoints": fuzz_checkpoints,
  "replies": fuzz_replies,
}


def run(kind: str, folder: Path, *, seed: int, share: float) -> Outcome:
  """Reads a share of the inputs of one kind."""
  folder.mkdir(parents=True, exist_ok=True)
  count = max(1, round(COUNTS[kind] * share))
  return KINDS[kind](folder, random.Random(f"{kind} {seed}"), count)


def main(argv: list[str]) -> None:
  """Reads the inputs and prints the table."""
  del argv
  has_findings = False
  with tempfile.TemporaryDirectory() as folder:
    for kind in KINDS:
      place = Path(folder) / kind.replace(" ", "_")
      outcome = run(kind, place, seed=_SEED.value, share=_SHARE.value)
      parts = ", ".join(f"{n} {what}" for what, n in sorted(outcome.counts.items()))
      print(f"{kind}: {parts}", flush=True)
      for finding in outcome.findings:
        print(f"  {finding}", flush=True)
      has_findings = has_findings or bool(outcome.findings)
  sys.exit(int(has_findings))


if __name__ == "__main__":
  app.run(main)
