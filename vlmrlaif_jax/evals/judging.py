"""Rates answers of benchmarks by a judge, and reads what the judge replies."""

import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed, jsonl
from vlmrlaif_jax.data.video import format_video_name
from vlmrlaif_jax.evals.benchmarks.protocol import (
  BenchmarkItem,
  BenchmarkModel,
  CaseJudge,
  JudgeCase,
  ScoredCase,
)


def rate_items(
  items: Sequence[BenchmarkItem],
  model: BenchmarkModel,
  judge: CaseJudge,
  config: ConfigDict,
  *,
  prompt: str,
  parse: Callable[[str], Mapping[str, float] | None],
) -> list[ScoredCase]:
  """Runs a benchmark of which a judge reads each answer alone; see Benchmark.run.

  Args:
    items: questions and their right answers; each value is also given by kind.
    model: the policy.
    judge: who rates.
    config: the settings, none of which matters.
    prompt: what the judge is asked, with {said} for the answer and other fields for
      those of the item.
    parse: see `judged`.
  """
  texts = model.answer([item.question for item in items])
  cases = []
  for item, text in zip(items, texts, strict=True):
    fields = item._asdict() | {"question": item.question.text, "said": text}
    asked = prompt.format(**fields)
    id, video = item.question.id, item.question.video
    cases.append(JudgeCase(id, video, asked, item.answer, (text,), item.rival))
  rows = []
  for item, row in zip(items, judge_cases(cases, judge, parse), strict=True):
    kinds = {f"{item.kind}.{name}": x for name, x in row.values.items() if item.kind}
    rows.append(row._replace(values=row.values | kinds))
  return rows


def judge_cases(
  cases: Sequence[JudgeCase],
  judge: CaseJudge,
  parse: Callable[[str], Mapping[str, float] | None],
) -> list[ScoredCase]:
  """What becomes of each case; one without an answer is not judged.

  Args:
    parse: the values that a reply names; None if it cannot be told.
  """
  asked = [case for case in cases if None not in case.responses]
  replies = dict(zip((c.id for c in asked), judge.ask(asked), strict=True))

  def outcome(case: JudgeCase) -> ScoredCase:
    found = ScoredCase(case.id, format_video_name(case.video), {}, right=case.answer)
    if case.id not in replies:
      return found._replace(fault="unanswered")
    reply = replies[case.id]
    if reply is None:
      return found._replace(fault="unjudged")
    values = parse(reply)
    return found._replace(values=dict(values or {}), fault="" if values else "unparsed")

  return [outcome(case) for case in cases]


def cache_judge(judge: CaseJudge, path: pathlib.Path, batch: int) -> CaseJudge:
  """A judge who is not asked again what stands in a file; no reply is asked for again.

  Args:
    batch: cases whose replies reach the file together.
  """

  def ask(cases: Sequence[JudgeCase]) -> list[str | None]:
    keys = [_key(judge, case) for case in cases]
    rows = distributed.on_process_zero(
      lambda: jsonl.read_jsonl(path) if path.exists() else []
    )
    known = {row["key"]: row["reply"] for row in rows}
    wanted = {k: c for k, c in zip(keys, cases, strict=True) if k not in known}
    todo = list(wanted.items())
    for start in range(0, len(todo), batch):
      part = todo[start : start + batch]
      replies = judge.ask([case for _, case in part])
      made = [
        {"key": key, "id": case.id, "reply": reply}
        for (key, case), reply in zip(part, replies, strict=True)
        if reply is not None
      ]
      distributed.on_process_zero(functools.partial(jsonl.append_jsonl, path, made))
      known |= {row["key"]: row["reply"] for row in made}
    return [known.get(key) for key in keys]

  return judge._replace(ask=ask)


def _key(judge: CaseJudge, case: JudgeCase) -> str:
  """Names all that a reply depends on, but for where the videos lie."""
  facts = (judge.name, sorted(judge.facts.items()), case._replace(video=""))
  return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


# What judges say: '{"score": 4}', "{'pred': 'yes', 'score': 4.8}", "score: 4/5", "4".

_SCORE = re.compile(
  r"""(?<![a-z_])score["']?\s*[:=]\s*["']?([^\s"',}\]]+(\s*/\s*\d+)?)"""
)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*(?:/\s*5)?")


def parse_score(text: str) -> float | None:
  """The one score from 0 to 5 that a reply names; None for none, others, or several."""
  plain = text.lower().replace("*", "").strip()
  found = {match[1].rstrip(".") for match in _SCORE.finditer(plain)}
  said = found or {plain.rstrip(".")}  # A bare number is a score, too.
  numbers = {match and float(match[1]) for match in map(_NUMBER.fullmatch, said)}
  if len(numbers) != 1:
    return None
  [score] = numbers
  return score if score is not None and score <= 5 else None
