r"""Parses scores and ratings of judges.

Video-ChatGPT's prompts request {"score": 4}, MMHal-Bench's "rating: 4", and Generative
RLHF-V's \boxed{8, 6} (2505.18531).
"""

import math
import re
import unicodedata

from vlmrlaif_jax.feedback.replies.cleaning import clean_reply, extract_answer

# A number, its scale, and what makes it unreadable: a range, a per cent, more digits.
_VALUE = (
  r"(?<![\d.,])(?P<number>-?\d{1,6}(?:[.,]\d{1,6})?)(?![.,]?\d)"
  r"(?: ?\(?(?:/|out of|of|分 ?[,(]? ?满分) ?"
  r"(?P<scale>\d{1,6}(?:\.0{1,6})?)(?![.,]?\d))?"
  r"(?P<rest> ?(?:(?:-|~|\b(?:to|or|and)\b|到|至) ?\d|[%+]))?"
)
_OPEN = r"[\"'\[({]{0,3} ?"
_SEPARATOR = (
  r"[\"'\]]?(?: ?\([^()\n]{0,40}\)| (?:from|between|on a scale)[^:=\n]{0,30})?"
  r" ?(?:[:=]|\b(?:is|was|of)\b|[是为]|\n|- ) ?"
)
_FINAL = re.compile(
  r"\b(?:final|overall|total)[ _]\w{1,10}\W{1,6}(?:\w{1,4}\W{1,4})?$|"
  r"(?:最终|总)\w{0,4}\W{0,4}$"
)
_UNITS = r" ?(?:points?|stars?|分)?[\"'\])}. ]{0,4}"
# Forms without a label, from the most to the least explicit.
_FORMS = (
  re.compile(rf"\[\[ ?{_VALUE} ?\]\]"),
  re.compile(rf"{_VALUE}(?(scale)|(?!))"),
  re.compile(
    r"\b(?:give|rate|score|assign|award|deserve|get)(?:s|d)?(?: [a-z']{1,12}){0,6} "
    rf"{_OPEN}{_VALUE}"
  ),
  re.compile(rf"^{_OPEN}{_VALUE}{_UNITS}$", re.MULTILINE),
)
_GENERIC = "score|rating|grade|mark|评分|得分|分数|打分"


def parse_score(text: str, *, high: int, name: str = "score") -> float | None:
  """Returns the score of a reply; None without exactly one from 0 to `high`.

  A score with this name has priority, then any other name of a score, then a number
  in another form. A final or overall score has priority over others.

  >>> parse_score("**Score:** 4.5 out of 5", high=5)
  4.5
  >>> parse_score("Score: 4-5", high=5)

  Args:
    text: The reply.
    high: The highest score. A score on another scale, such as 8/10, is not read.
    name: Name of the score in the prompt.
  """
  plain = clean_reply(text).lower()
  labeled = [
    re.compile(rf"(?<![a-z_])(?:[a-z]{{1,20}}_)?(?:{names}){_SEPARATOR}{_OPEN}{_VALUE}")
    for names in (name, _GENERIC)
  ]
  for form in (*labeled, *_FORMS):
    matches = [*form.finditer(plain)]
    starts = [match.start("number") for match in matches]
    finals = [
      match
      for match, start in zip(matches, starts, strict=True)
      if _FINAL.search(plain[max(start - 40, 0) : start])
    ]
    values = {_read_value(match, high) for match in finals or matches}
    if values:
      return values.pop() if len(values) == 1 else None
  return None


def _read_value(match: re.Match, high: int) -> float | None:
  number = float(match["number"].replace(",", "."))
  is_on_scale = match["scale"] is None or float(match["scale"]) == high
  is_valid = is_on_scale and not match["rest"] and 0 <= number <= high
  return number if is_valid else None


def parse_boxed_scores(text: str, count: int = 2) -> tuple[float, ...] | None:
  r"""Returns the numbers in the last \boxed{}; None unless there are `count`.

  "\boxed{8, 6}" is (8, 6), and so is "[[8, 6]]" in a reply without a box. Empty items
  are ignored, and the range is not checked. Scores outside a box are not read, because
  a reward for them would not teach the form.

  Args:
    text: The reply.
    count: Number of scores, one for each response.
  """
  answer = unicodedata.normalize("NFKC", extract_answer(text))
  opening, closing = (r"\boxed{", "}") if r"\boxed{" in answer else ("[[", "]]")
  _, box, rest = answer.rpartition(opening)
  content, end, _ = rest.partition(closing)  # A number contains no braces.
  try:
    numbers = tuple(float(piece) for piece in content.split(",") if piece.strip())
  except ValueError:
    return None
  is_valid = box and end and len(numbers) == count and all(map(math.isfinite, numbers))
  return numbers if is_valid else None
