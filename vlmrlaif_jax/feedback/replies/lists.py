"""Parses lists of facts and questions.

RLAIF-V's prompts (2405.17220) request a list under "### Facts:" whose lines start with
"- ". The prompts for very small models request one item per line.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterable
from typing import Any

from vlmrlaif_jax.feedback.replies.cleaning import extract_answer

_CIRCLED = "①-⑳⑴-⑽❶-❿"
# Full-width forms: brackets \uff08 \uff09, full stop \uff0e, colon \uff1a.
_MARKER = re.compile(
  r"[ \t\u3000]{0,40}(?:"
  r"[*+][ \t]|-(?!\d)|[•·‣▪▫◦●○■□◆▶►→✓✔☑∙\u2043\u2013\u2014]|"
  r"(?:\*\*)?[(\uff08\[]?\d{1,3}[.)、\uff0e\uff09\]](?!\d)(?:\*\*)?|"
  rf"[{_CIRCLED}]|[(\uff08]?[一二三四五六七八九十]{{1,3}}[、.)\uff09]|"
  r"\d{1,3}[:\uff1a][ \t]|\(?[a-z]\)|[a-z]\.[ \t]|[ivx]{1,4}[.)][ \t])"
  r"[ \t\u3000]{0,40}(?:\[[ xX]\][ \t])?"
)
_HEADING = re.compile(r"[ \t]{0,40}#|.{0,200}[:\uff1a][*_ \t]{0,8}$")
_NUMBERED = re.compile(r"(?:^|(?<=[\s。.;\uff1b!]))(\d{1,3})[.)、\uff0e](?=\D)")
_LABEL = re.compile(
  r"[*_]{0,3}(?:facts?|claims?|(?:modified )?sentences?|questions?|statements?|"
  r"事实|问题|陈述)[ \t]?\d{0,3}[*_]{0,3}[ \t]?[:\uff1a][*_]{0,3}[ \t]?",
  re.IGNORECASE,
)
_AROUND = re.compile(
  r"(?:sure|certainly|of course|okay|ok|absolutely|here (?:are|is)|here's|"
  r"below (?:are|is)|the following|let me know|i hope|hope this|feel free|"
  r"please (?:let|note)|if you (?:need|want|have|would)|is there anything|note:|"
  r"note that|these are the|based on the (?:answer|text)|that's all|would you like)"
  r"(?!\w)|好的|当然|以下是|如果您|希望",
  re.IGNORECASE,
)
_NOTHING = re.compile(
  r"\W{0,10}(?:none|nothing|null|n/a|empty|(?:there (?:are|is) )?no (?:\w+ ){0,3}"
  r"(?:facts?|claims?|statements?|sentences?)(?: .{0,100})?|"
  r"none of .{0,60}(?:facts?|claims?)|"
  r"the answer (?:contains|has|states) no .{0,30}(?:facts?|claims?|statements?)|"
  r"无|没有.{0,10}(?:事实|陈述).{0,10})?\W{0,10}",
  re.IGNORECASE,
)
_REFUSAL = re.compile(
  r"(?:i'?m sorry|sorry|i apologi[sz]e|i (?:can(?:no|')t|am unable)|i'm unable|"
  r"unfortunately, i|as an ai|抱歉|对不起)",
  re.IGNORECASE,
)


def parse_list(text: str) -> list[str] | None:
  r"""Returns the items of a list; [] for "none", None for a reply without a list.

  Items are the lines with a bullet or number, an indented line being part of the item
  before it. Without such lines, each line is an item that is no heading and no phrase
  around a list ("Sure!", "Let me know ..."). A JSON array is a list, too.

  >>> parse_list("Sure! Here are the facts:\n1. A dog runs.\n2. It is brown.")
  ['A dog runs.', 'It is brown.']
  """
  if not text.strip():
    return []
  answer = extract_answer(text).strip()
  parts = answer.split("```")
  if len(parts) == 3:  # One block of code, which contains the list.
    answer = re.sub(r"^\w{0,20}[ \t]*\n", "", parts[1])
  items = _read_json(answer)
  if items is None:
    items = [*map(_strip_markup, _read_lines(answer))]
    if len(items) == 1 and _REFUSAL.match(items[0]):
      return None
  items = [item for item in items if item]
  if len(items) == 1 and _NOTHING.fullmatch(items[0]):
    return []
  if items or not answer:
    return items or None
  headings = [line for line in answer.splitlines() if line.strip()]
  is_empty = all(_HEADING.match(line) or _NOTHING.fullmatch(line) for line in headings)
  return [] if is_empty else None


def _read_json(answer: str) -> list[str] | None:
  """Returns the texts of a JSON or Python list, None for any other text."""
  starts = [i for i in (answer.find("["), answer.find("{")) if i >= 0]
  if not starts or "\n" in answer[: min(starts)].strip() or len(answer) > 100_000:
    return None
  end = max(answer.rfind("]"), answer.rfind("}")) + 1
  content = answer[min(starts) : end]
  value: Any = None
  try:
    value = json.loads(content)
  except (ValueError, RecursionError):
    try:
      with warnings.catch_warnings(action="ignore"):
        value = ast.literal_eval(content)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
      return None
  if isinstance(value, dict):
    lists = [each for each in value.values() if isinstance(each, list)]
    value = lists[0] if len(lists) == 1 else None
  if not isinstance(value, list):
    return None
  texts = [_get_text(item) for item in value]
  return None if None in texts else [text.strip() for text in texts if text]


def _get_text(item: Any) -> str | None:
  """Returns an item's text: a string, or the only string of an object."""
  values: Iterable[Any] = item.values() if isinstance(item, dict) else [item]
  texts = [each for each in values if isinstance(each, str)]
  return texts[0] if len(texts) == 1 else None


def _read_lines(answer: str) -> list[str]:
  lines = [line.rstrip() for line in _split_inline(answer).splitlines()]
  marked: list[str] = []
  is_open = False  # Whether an indented line continues the last item.
  for line in lines:
    marker = _MARKER.match(line)
    if marker:
      marked.append(line[marker.end() :])
      is_open = True
    elif not line:
      is_open = False
    elif is_open and line[0].isspace() and not _HEADING.match(line):
      marked[-1] += f" {line.strip()}"
    else:
      is_open = False
  if marked:
    return [item for item in marked if not _HEADING.match(item)]
  plain = [_LABEL.sub("", line.strip(), count=1) for line in lines if "###" not in line]
  items = [x for x in plain if x and not _HEADING.match(x) and not _AROUND.match(x)]
  return [item for item in items if item not in ("```", "---", "***")]


def _split_inline(answer: str) -> str:
  """Starts a line at each number of "1. ... 2. ...", if they count from 1."""
  matches = [*_NUMBERED.finditer(answer)]
  if len(matches) < 2 or [int(m[1]) for m in matches] != [*range(1, len(matches) + 1)]:
    return answer
  starts = [match.start() for match in matches]
  ends = [*starts[1:], len(answer)]
  parts = [answer[a:b].strip(" ") for a, b in zip(starts, ends, strict=True)]
  return "\n".join([answer[: starts[0]], *parts])


def _strip_markup(item: str) -> str:
  """Removes a label, emphasis and quotation marks around an item."""
  item = _LABEL.sub("", item.strip(), count=1).strip()
  if item.count("**") == 1:  # "**1. A dog runs.**" without its marker.
    item = item.replace("**", "")
  for mark in ("**", "__", '"', "`", "*"):
    inner = item[len(mark) : -len(mark)]
    if item.startswith(mark) and item.endswith(mark) and inner and mark not in inner:
      item = inner
  return item.strip()
