"""Statistics of labeled pairs and of claims, from the rates.json of each stage."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from vlmrlaif_jax.core.stage_log import number
from vlmrlaif_jax.evals.summary import is_number
from vlmrlaif_jax.report.files import Row, read_json, stage_facts

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


def labels_view(root: Path, stages: Iterable[str]) -> list[Row]:
  """Returns the statistics of each stage that judged pairs or claims, in order."""
  found = []
  for name in stages:
    rates = read_json(root / name / "rates.json")
    if "asked" in rates:
      found.append({"title": "", **pairs_view(rates)})
    elif "claims" in rates:
      found.append({"title": stage_facts(root, name).title, **claims_view(rates)})
  return found


def pairs_view(rates: Row) -> Row:
  """Returns the outcomes of the pairs that the judge compared."""
  asked = rates["asked"]
  facts = {}
  kept, swayed = rates.get("kept", 0), rates.get("order_inconsistent", 0)
  if kept + swayed:
    facts["agreement between the two orders"] = percent(kept / (kept + swayed))
  if is_number(rates.get("first_chosen")):
    said = "of choices are for the answer shown first (50 %: its place sways none)"
    facts[said] = percent(rates["first_chosen"])
  outcomes = {said: rates[key] for key, said in OUTCOMES.items() if key in rates}
  return {
    "told": f"The judge was shown {asked:,} pairs of answers.",
    "agreed": agreed(
      "Where it decided, it agreed with exact truth {} of the time.", rates
    ),
    "parts": parts(outcomes, asked),
    "facts": facts | others(rates, ["asked", "first_chosen", *OUTCOMES]),
  }


def claims_view(rates: Row) -> Row:
  """Returns the outcomes of a round's answers and of their claims."""
  answers = [key for key in rates if key.startswith("answers_")]
  name = lambda key: key.removeprefix("answers_").replace("_", " ")
  outcomes = {name(key): rates[key] for key in answers}
  asked = sum(outcomes.values())
  denied = rates.get("claims_denied")
  facts = {"of the claims are denied": percent(denied)} if is_number(denied) else {}
  return {
    "told": f"{asked:,} answers, {rates['claims']:,} claims.",
    "agreed": agreed(
      "Of the pairs made of them {} are as exact truth has them.", rates
    ),
    "parts": parts(outcomes, asked),
    "facts": facts | others(rates, ["claims_denied", *answers]),
  }


def parts(outcomes: dict[str, int], asked: int) -> list[Row]:
  """Returns the outcomes with their shares of all that were judged."""
  return [
    {"name": name, "count": count, "share": count / max(asked, 1)}
    for name, count in outcomes.items()
  ]


def agreed(sentence: str, rates: Row) -> str:
  """Returns how often truth says the same, in words."""
  share = rates.get("truth_agreement")
  if share is None:
    return "There is no exact truth to check it against."
  return sentence.format(percent(share))


def others(rates: Row, shown: Sequence[str]) -> Row:
  """Returns the lengths of answers in one sentence, and other counts by their names.

  A judge may prefer the longer answer. What was not counted is left out.

  Args:
    rates: Content of rates.json.
    shown: Keys that the page shows elsewhere.
  """
  facts = {}
  if all(is_number(rates.get(key)) for key in WORDS):
    chosen, rejected = (rates[key] for key in WORDS)
    said = f"words in a chosen answer, {rejected:.1f} in a rejected one"
    facts[said] = f"{chosen:.1f}"
  for key, value in rates.items():
    if value is not None and key not in (*shown, *WORDS, "truth_agreement"):
      text = number(float(value)) if is_number(value) else str(value)
      facts[NAMES.get(key, key.replace("_", " "))] = text
  return facts


def percent(share: float | int) -> str:
  """Formats a share."""
  return f"{100 * share:.1f} %"
