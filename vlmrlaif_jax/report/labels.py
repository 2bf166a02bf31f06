"""What became of the pairs put before a judge, and of claims."""

from pathlib import Path
from typing import Any, TypeAlias

from vlmrlaif_jax.core.stage_log import number
from vlmrlaif_jax.core.stage_names import split_round, title
from vlmrlaif_jax.evals.summary import is_number
from vlmrlaif_jax.report.files import read_json
from vlmrlaif_jax.report.stages import stages_there

Row: TypeAlias = dict[str, Any]

OUTCOMES = {
  "kept": "kept",
  "tie": "tie",
  "order_inconsistent": "changed with the order",
  "unparsable": "not understood",
}
WORDS = ("chosen_words", "rejected_words")  # Shown in one sentence.
NAMES = {
  "identical": "pairs alike, and not judged",
  "empty": "with an empty answer, and not judged",
  "too_long": "too long, and not judged",
  "truth_pairs": "kept pairs that truth tells apart",
}


def labels_view(root: Path) -> list[Row]:
  """The statistics of each stage that labels, in order."""
  found = []
  for name in stages_there(root):
    kind, _ = split_round(name)
    rates = read_json(root / name / "rates.json")
    if rates and kind == "label":
      found.append({"stage": name, **pairs_view(rates)})
    elif rates and kind == "claims":
      found.append({"stage": name, **claims_view(rates, title(name))})
  return found


def pairs_view(rates: Row) -> Row:
  """What became of the pairs that the judge was shown."""
  asked = rates.get("asked") or 0
  parts = [
    {"name": said, "count": rates[key], "share": rates[key] / asked}
    for key, said in OUTCOMES.items()
    if asked and key in rates
  ]
  facts = {}
  kept, swayed = rates.get("kept", 0), rates.get("order_inconsistent", 0)
  if kept + swayed:
    facts["agreement between the two orders"] = percent(kept / (kept + swayed))
  if is_number(rates.get("first_chosen")):
    said = "of choices are for the answer shown first (50 %: its place sways none)"
    facts[said] = percent(rates["first_chosen"])
  others = {
    key: value
    for key, value in rates.items()
    if key not in ("asked", "truth_agreement", "first_chosen", *OUTCOMES, *WORDS)
  }
  return {
    "title": "",
    "told": f"The judge was shown {asked:,} pairs of answers.",
    "agreed": agreed(
      "Where it decided, it agreed with exact truth {} of the time.", rates
    ),
    "parts": parts,
    "facts": facts | lengths(rates) | plain(others),
  }


def claims_view(rates: Row, stage: str) -> Row:
  """What became of a round's answers and their claims."""
  answers = {key: rates[key] for key in rates if key.startswith("answers_")}
  asked = sum(answers.values())
  others = {
    key: value
    for key, value in rates.items()
    if key not in ("truth_agreement", "claims_denied", *answers, *WORDS)
  }
  denied = rates.get("claims_denied")
  facts = {"of the claims are denied": percent(denied)} if is_number(denied) else {}
  return {
    "title": stage,
    "told": f"{asked:,} answers, {rates.get('claims', 0):,} claims.",
    "agreed": agreed(
      "Of the pairs made of them {} are as exact truth has them.", rates
    ),
    "parts": [
      {
        "name": key.removeprefix("answers_").replace("_", " "),
        "count": count,
        "share": count / max(asked, 1),
      }
      for key, count in answers.items()
    ],
    "facts": facts | lengths(rates) | plain(others),
  }


def agreed(sentence: str, rates: Row) -> str:
  """How often truth says the same, in words."""
  share = rates.get("truth_agreement")
  if share is None:
    return "There is no exact truth to check it against."
  return sentence.format(percent(share))


def lengths(rates: Row) -> Row:
  """How long chosen and rejected answers are: a judge may prefer the longer one."""
  if not all(is_number(rates.get(key)) for key in WORDS):
    return {}
  chosen, rejected = (rates[key] for key in WORDS)
  said = f"words in a chosen answer, {rejected:.1f} in a rejected one"
  return {said: f"{chosen:.1f}"}


def plain(rates: Row) -> Row:
  """Other counts, by their names in the file; what was not counted is left out."""
  said = lambda x: number(float(x)) if is_number(x) else str(x)
  return {NAMES.get(k, k.replace("_", " ")): said(x)
          for k, x in rates.items() if x is not None}  # fmt: skip


def percent(share: float | int) -> str:
  return f"{100 * share:.1f} %"
