"""Preference pairs from answers whose claims were checked, and their rates."""

import collections
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.feedback import claims
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.labeling import pairwise

Row = dict[str, Any]


def write(
  run: Run,
  stage: str,
  examples: Sequence[Example],
  rows: Sequence[Row],
  folder: pathlib.Path,
  log: Log,
) -> dict[str, Any]:
  """Chooses the pairs, writes them and their rates, and returns those."""
  config = run.config.claims
  drawn = [
    (example, row, pair)
    for example, row in zip(examples, rows, strict=True)
    for pair in pairs_of(example, row, config, run.config.seed)
  ]
  texts = [tuple(row["answers"][i] for i in pair) for _, row, pair in drawn]
  balanced = claims.balance_lengths(texts)
  kept = balanced.kept if config.balance else range(len(drawn))
  videos = run.workdir / "world" / "videos"
  pairs = [preference_row(*drawn[i], videos) for i in kept]
  summary = rates(rows, [drawn[i][1:] for i in kept])
  summary |= {
    "pairs_drawn": len(drawn),
    "rho": balanced.rho if config.balance else None,
  }
  pairwise.write(folder, pairs, summary)
  log.table(f"{stage}: claims", [{"what": k, "value": _say(v)}
                                  for k, v in summary.items()])  # fmt: skip
  return summary


def pairs_of(
  example: Example, row: Row, config: ConfigDict, seed: int
) -> list[tuple[int, int]]:
  """(chosen, rejected) answers of a prompt, by number; none that was cut."""
  scores = [
    score if stopped else None
    for score, stopped in zip(row["scores"], row["stopped"], strict=True)
  ]
  return claims.choose_pairs(
    example["id"],
    row["answers"],
    scores,
    seed=seed,
    limit=config.pairs,
    gap=config.gap,
  )


def preference_row(
  example: Example, row: Row, pair: tuple[int, int], videos: pathlib.Path
) -> Row:
  """A pair as records.read_preferences takes it, with each claim's verdict."""
  chosen, rejected = pair
  of = lambda name: [row[name][i] for i in pair]
  told = "\n".join(
    f"Output {place}: {_verdicts(row, i)}" for place, i in enumerate(pair, start=1)
  )
  return pairwise.preference_row(
    example,
    {
      "id": f"{row['id']}:{chosen}-{rejected}",
      "preference": 1,
      "outputs": of("answers"),
      "stopped": of("stopped"),
      "mistakes": of("mistakes"),
      "narrative": "",
    },
    videos,
    told=told,
  )


def _verdicts(row: Row, number: int) -> str:
  """Each claim of an answer, accepted (+) or rejected (-)."""
  verdicts = zip(row["claims"][number], row["chances"][number], strict=True)
  return " ".join(
    f"[{'+' if yes > no else '-'}] {said}" for said, (yes, no) in verdicts
  )


def rates(
  rows: Sequence[Row], pairs: Sequence[tuple[Row, tuple[int, int]]]
) -> dict[str, Any]:
  """What became of answers, claims and pairs, and how often the pairs are right.

  "truth_agreement" is a share of "truth_pairs": those whose answers differ in
  mistakes. "supported_agreement" likewise, of statements that nothing bears out alone.
  """
  outcomes = collections.Counter(o for row in rows for o in row["outcomes"])
  chances = [pair for row in rows for each in row["chances"] for pair in each]
  asked = [pair for pair in chances if pair is not None]
  length = lambda side: [len(row["answers"][p[side]].split()) for row, p in pairs]
  mean = lambda values: float(np.mean(values)) if len(values) else None
  agreed = {
    name: [row[name][p[0]] < row[name][p[1]] for row, p in pairs
           if row[name][p[0]] is not None and row[name][p[0]] != row[name][p[1]]]
    for name in ("mistakes", "unsupported")
  }  # fmt: skip
  return {
    "prompts": len(rows),
    **{f"answers_{name}": outcomes[name] for name in claims.OUTCOMES},
    "claims": len(asked),
    "claims_denied": mean([not yes > no for yes, no in asked]),
    "pairs": len(pairs),
    "chosen_words": mean(length(0)),
    "rejected_words": mean(length(1)),
    "truth_agreement": mean(agreed["mistakes"]),
    "truth_pairs": len(agreed["mistakes"]),
    "supported_agreement": mean(agreed["unsupported"]),
    "supported_pairs": len(agreed["unsupported"]),
  }


def _say(value: float | int | None) -> str:
  return f"{value:.3f}" if isinstance(value, float) else str(value)
