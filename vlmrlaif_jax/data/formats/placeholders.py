"""Placeholders of videos and images in the texts of records.

The template inserts the video, so a record's own placeholders are removed, or replaced
by marks of their places. A word within a sentence, as in "Is <image> a tag?", is text.
"""

import bisect
import itertools
import re
from typing import NamedTuple

from vlmrlaif_jax.data import templates

_PARTS = "".join(templates.PART_MARKS.values())
# Any case. A pair, or a run of one model's padding, is one placeholder.
_PLACEHOLDER = re.compile(
  rf"""
    [{_PARTS}] |
    \(?<(?:image|video)>\./</(?:image|video)>\)?  # MiniCPM-V
  | <(?:img|image|video|vid)>(?:<IMG_CONTEXT>)*\s?</(?:img|image|video|vid)>
  | <\|vision_start\|>(?:<\|(?:image|video|placeholder)_?(?:pad)?\|>)*<\|vision_end\|>
  | <\|vision_bos\|>(?:<\|(?:IMAGE|VIDEO)\|>)*<\|vision_eos\|>  # Qwen2.5-Omni
  | <\|begin_of_(?:image|video)\|>(?:<\|(?:image|video)\|>)*<\|end_of_(?:image|video)\|>
  | <(?:vid|im)_start>(?:<(?:vid|im)_patch>)*<(?:vid|im)_end>  # Video-ChatGPT, LLaVA
  | <\|media_(?:start|begin)\|>(?:image|video)<\|media_content\|>
    (?:<\|media_pad\|>)*<\|media_end\|>  # Kimi-VL
  | <start_of_image>(?:<image_soft_token>)*(?:<end_of_image>)?  # Gemma 3
  | (?:<\|(?:image|video)_pad\|>)+
  | (?:<IMG_CONTEXT>)+
  | <\|(?:image|video|img|vid|media)(?:[_-]?\d+|[_-]?placeholder|[_-]?token)?\|>
  | <(?:image|video|img|vid)(?:[_-]?\d+|[_-]?placeholder|[_-]?here|[_-]?token)?/?>
  | \[(?:image|video|img|vid)(?:[_-]?\d+|[_-]?placeholder)?\]
  | <__media__>  # llama.cpp
  """,
  re.VERBOSE | re.IGNORECASE,
)
_NAMED = re.compile(
  r"<(img|image|video)>(?!\./<)[^<>\n]{0,200}[./][^<>\n]{0,200}</\1>", re.IGNORECASE
)
# Openings of prompts that another model's chat template has rendered.
_RENDERED = re.compile(
  r"\s*(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|begin_of_text\|>"
  r"|<\|user\|>|<\|system\|>|<s>\s*\[INST\])"
)
_MARK = templates.VIDEO_MARK  # `templates.check_plain_text` rejects it in a text.
_BLANK = f" \t\r\n\v\f{_MARK}"


class Placeholder(NamedTuple):
  """A placeholder in a text."""

  start: int  # Index of its first character.
  stop: int  # Index after its last character.
  kind: str  # "video", "image", or "" if it names neither.
  is_part: bool  # Whether it is a part of a message, and not written in the text.
  is_inline: bool  # Whether it is a part of a sentence.


class PlainText(NamedTuple):
  """A text without its placeholders."""

  text: str
  removed: int  # Number of placeholders that were removed.
  inline: str  # First placeholder that is part of a sentence, or "".


def check_text(text: str) -> None:
  """Checks that a text is neither a rendered prompt nor names a file in a tag.

  Raises:
    ValueError: It is or does.
  """
  if _RENDERED.match(text):
    raise ValueError("it is a prompt in another model's template: give the plain text")
  if _NAMED.search(text):
    raise ValueError('it names a file in a tag: give the file as "video" or "images"')


def find_placeholders(text: str) -> list[Placeholder]:
  """Returns the placeholders of a text, in order.

  Those at the start, at the end, on a line of their own, and parts of a message are not
  inline.
  """
  blanked = _blank_placeholders(text)
  start = len(blanked) - len(blanked.lstrip(_BLANK))
  stop = len(blanked.rstrip(_BLANK))
  lines = blanked.split("\n")
  alone = [not line.strip(_BLANK) for line in lines]
  offsets = [0, *itertools.accumulate(len(line) + 1 for line in lines)]
  matches = []
  for match in _PLACEHOLDER.finditer(text):
    line = bisect.bisect_right(offsets, match.start()) - 1
    is_part = match[0] in templates.PART_MARKS.values()
    is_own = match.end() <= start or match.start() >= stop or alone[line] or is_part
    kind = _find_kind(match[0])
    matches.append(Placeholder(match.start(), match.end(), kind, is_part, not is_own))
  return matches


def count_places(text: str) -> int:
  """Returns the number of places with placeholders, which are next to each other."""
  blanked, count, end = _blank_placeholders(text), 0, None
  for each in find_placeholders(text):
    if not each.is_inline:
      count += end is None or bool(blanked[end : each.start].strip(_BLANK))
      end = each.stop
  return count


def remove_placeholders(text: str) -> PlainText:
  r"""Removes placeholders at the start, at the end and on lines of their own.

  >>> remove_placeholders("<|video_pad|>\nIs <image> a tag?")
  PlainText(text='Is <image> a tag?', removed=1, inline='<image>')

  Args:
    text: A question without noncharacters but PART_MARKS.

  Raises:
    ValueError: The text is another model's rendered prompt, names a file in a tag, or
      has placeholders in several places.
  """
  check_text(text)
  if count_places(text) > 1:
    raise ValueError("its placeholders are in several places: keep those at its start")
  for mark in templates.PART_MARKS.values():  # A part is a line of its own.
    text = text.replace(mark, f"\n{mark}\n")
  matches = find_placeholders(text)
  own = [each for each in matches if not each.is_inline]
  inline = [text[each.start : each.stop] for each in matches if each.is_inline]
  lines = replace_placeholders(text, own, _MARK).strip(_BLANK).split("\n")
  lines_left = [line for line in lines if _MARK not in line]
  return PlainText("\n".join(lines_left), len(own), inline[0] if inline else "")


def replace_placeholders(text: str, matches: list[Placeholder], mark: str) -> str:
  """Returns a text with a mark in place of each placeholder of `matches`."""
  stops = [0, *(each.stop for each in matches)]
  starts = [*(each.start for each in matches), len(text)]
  return mark.join(text[a:b] for a, b in zip(stops, starts, strict=True))


def is_placeholder(text: str) -> bool:
  """Returns whether a text consists of placeholders only."""
  return bool(text.strip()) and not _PLACEHOLDER.sub("", text).strip()


def has_part(text: str) -> bool:
  """Returns whether a text has the mark of a video or an image that is a part of it."""
  return any(mark in text for mark in templates.PART_MARKS.values())


def _blank_placeholders(text: str) -> str:
  return _PLACEHOLDER.sub(lambda match: _MARK * len(match[0]), text)


def _find_kind(placeholder: str) -> str:
  for kind, mark in templates.PART_MARKS.items():
    if placeholder == mark:
      return kind
  name = placeholder.lower()
  return "video" if "vid" in name else "image" if "im" in name else ""
