"""Placeholders of videos and images in the texts of records.

The template inserts the video, so a record's own placeholders are removed. A word
within a sentence, as in "Is <image> a tag of HTML?", is text.
"""

import re
from typing import NamedTuple

# Any case. A pair, or a run of one model's padding, is one placeholder.
_PLACEHOLDER = re.compile(
  r"""
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
_MARK = "\ufdd2"  # Noncharacter, which `templates.check_plain_text` rejects in a text.
_BLANK = f" \t\r\n\v\f{_MARK}"


class PlainText(NamedTuple):
  """A text without its placeholders."""

  text: str
  removed: int  # Number of placeholders that were removed.
  inline: str  # First placeholder that is part of a sentence, or "".


def remove_placeholders(text: str) -> PlainText:
  r"""Removes placeholders at the start, at the end and on lines of their own.

  >>> remove_placeholders("<|video_pad|>\nIs <image> a tag?")
  PlainText(text='Is <image> a tag?', removed=1, inline='<image>')

  Args:
    text: A question without noncharacters; see templates.check_plain_text.

  Raises:
    ValueError: The text is another model's rendered prompt, names a file in a tag, or
      has placeholders in several places.
  """
  if _RENDERED.match(text):
    raise ValueError("it is a prompt in another model's template: give the plain text")
  if _NAMED.search(text):
    raise ValueError('it names a file in a tag: give the file as "video" or "images"')
  originals = _PLACEHOLDER.findall(text)
  marked = _PLACEHOLDER.sub(_MARK, text)
  head = marked[: len(marked) - len(marked.lstrip(_BLANK))].count(_MARK)
  tail = marked[len(marked.rstrip(_BLANK)) :].count(_MARK)
  rest = iter(originals[head:])
  lines, inline = [], []
  places = (head > 0) + (tail > 0 and tail < len(originals))
  is_inside = False
  for line in marked.strip(_BLANK).split("\n"):
    own = [next(rest) for _ in range(line.count(_MARK))]
    is_alone = bool(own) and not line.strip(_BLANK)
    places += is_alone and not is_inside
    is_inside = is_alone
    if not is_alone:  # Placeholders within a sentence are kept.
      inline += own
      first, *others = line.split(_MARK)
      lines.append(first + "".join(a + b for a, b in zip(own, others, strict=True)))
  if places > 1:
    raise ValueError("its placeholders are in several places: keep those at its start")
  count = len(originals) - len(inline)
  return PlainText("\n".join(lines), count, inline[0] if inline else "")


def is_placeholder(text: str) -> bool:
  """Returns whether a text consists of placeholders only."""
  return bool(text.strip()) and not _PLACEHOLDER.sub("", text).strip()
