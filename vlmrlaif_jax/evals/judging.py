"""Rates answers of benchmarks by a judge."""

import functools
import hashlib
import pathlib
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
  """Runs a benchmark whose judge rates each answer by itself; see `Benchmark.run`.

  Args:
    items: Questions and right answers; each measure is also computed per kind.
    model: The policy.
    judge: The judge.
    config: The benchmark's settings, which are not used.
    prompt: The judge's prompt, a format string with fields of the item and the answer.
    parse: Returns the values in a reply, None if it is unreadable.
  """
  texts = model.answer([item.question for item in items])
  cases = []
  for item, answer in zip(items, texts, strict=True):
    fields = item._asdict() | {"question": item.question.text, "said": answer}
    text = prompt.format(**fields)
    id, video = item.question.id, item.question.video
    cases.append(JudgeCase(id, video, text, item.answer, (answer,), item.rival))
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
  """Returns the scored cases; a case without an answer is not judged.

  `parse` returns the values in a reply, or None if it is unreadable.
  """
  complete = [case for case in cases if None not in case.responses]
  replies = dict(zip((c.id for c in complete), judge.ask(complete), strict=True))

  def score(case: JudgeCase) -> ScoredCase:
    scored = ScoredCase(case.id, format_video_name(case.video), {}, right=case.answer)
    if case.id not in replies:
      return scored._replace(fault="unanswered")
    reply = replies[case.id]
    if reply is None:
      return scored._replace(fault="unjudged")
    values = dict(parse(reply) or {})
    return scored._replace(values=values, fault="" if values else "unparsed")

  return [score(case) for case in cases]


def cache_judge(judge: CaseJudge, path: pathlib.Path, batch: int) -> CaseJudge:
  """Returns a judge that caches its replies in a JSONL file, `batch` cases per write.

  A missing reply is not cached, so that the next call requests it again.
  """

  def ask(cases: Sequence[JudgeCase]) -> list[str | None]:
    keys = [_make_key(judge, case) for case in cases]
    rows = distributed.on_process_zero(
      lambda: jsonl.read_intact_rows(path)[0] if path.exists() else []
    )
    cached = {
      row["key"]: row["reply"] for row in rows if {"key", "reply"} <= row.keys()
    }
    missing = {k: c for k, c in zip(keys, cases, strict=True) if k not in cached}
    pending = list(missing.items())
    for start in range(0, len(pending), batch):
      chunk = pending[start : start + batch]
      replies = judge.ask([case for _, case in chunk])
      new_rows = [
        jsonl.seal_row({"key": key, "id": case.id, "reply": reply})
        for (key, case), reply in zip(chunk, replies, strict=True)
        if reply is not None
      ]
      distributed.on_process_zero(functools.partial(jsonl.append_jsonl, path, new_rows))
      cached |= {row["key"]: row["reply"] for row in new_rows}
    return [cached.get(key) for key in keys]

  return judge._replace(ask=ask)


def _make_key(judge: CaseJudge, case: JudgeCase) -> str:
  """Returns a hash of all that a reply depends on, except the video's location."""
  # The text must not change: caches of earlier versions have its hash.
  text = (
    f"({judge.name!r}, {sorted(judge.facts.items())!r}, "
    f"Case(id={case.id!r}, video='', prompt={case.prompt!r}, answer={case.answer!r}, "
    f"said={case.responses!r}, rival={case.rival!r}))"
  )
  return hashlib.sha256(text.encode()).hexdigest()[:32]
