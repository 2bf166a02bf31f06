r"""Removes from a reply all that is not part of its answer.

Every parser reads cleaned text: without thoughts, tags, special tokens, code fences and
Markdown, and in one form of characters. "[[A]]" and "\boxed{A}" have the same form.
"""

import html
import re
import unicodedata

# Tags of single models, as tags that all models share.
_TAGS = {
  "<|begin_of_thought|>": "<think>",
  "<|end_of_thought|>": "</think>",
  "◁think▷": "<think>",
  "◁/think▷": "</think>",
  "[THINK]": "<think>",
  "[/THINK]": "</think>",
  "<|begin_of_solution|>": "<answer>",
  "<|end_of_solution|>": "</answer>",
  "<|begin_of_box|>": "<answer>",
  "<|end_of_box|>": "</answer>",
}
_THOUGHT = re.compile(
  r"<\s?(/?)\s?(?:\w{1,20}:)?"
  r"(think|thinking|thoughts?|reason|reasoning|reflection|analysis|rationale|scratchpad)"
  r"(?:\s[^<>]{0,200})?/?>",
  re.IGNORECASE,
)
# The channel of the answer in gpt-oss's format, with and without special tokens.
_CHANNEL = re.compile(
  r"<\|channel\|>final[^<>]{0,40}<\|message\|>|(?<=[.!?\s])assistantfinal"
)
_ANSWER = re.compile(r"<\s?(?:final_)?(?:answer|solution)\s?>", re.IGNORECASE)
_ANSWER_END = re.compile(r"</\s?(?:final_)?(?:answer|solution)\s?>", re.IGNORECASE)
_END = re.compile(r"<\|(?:im_end|eot_id|endoftext|end|return)\|>|</s>|<end_of_turn>")
# A tag that names its content is a label: "<score>4</score>".
_LABEL_TAG = re.compile(
  r"<((?:final_)?(?:verdict|winner|choice|preference|score|rating|ranking|pred))>",
  re.IGNORECASE,
)
_OTHER_TAG = re.compile(r"<\|[^<>|]{1,40}\|>|</?[a-z][\w:-]{0,30}\s?/?>", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]{0,8}(?:```|~~~)[\w+-]{0,20}[ \t]{0,8}$", re.MULTILINE)
_CHARACTERS = str.maketrans(
  {
    **dict.fromkeys("\u2018\u2019\u201b\u00b4", "'"),
    **dict.fromkeys("“”„«»「」『』", '"'),
    **dict.fromkeys("\u2212\u2013\u2010\u2011\u2012", "-"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\ufe0f\u00ad"),
    **{"【": "[", "】": "]", "½": ".5", "¼": ".25", "¾": ".75", "—": " — "},
  }
)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|rm)\s?\{([^{}]*)\}")
_BOX = re.compile(r"\\f?boxed\s?\{([^{}]*)\}")


def strip_thoughts(text: str) -> str | None:
  """Removes the thoughts of a reasoning model; None if a thought is open.

  A closing tag without an opening one ends a thought that began before the reply.

  >>> strip_thoughts("<think>A is longer.</think>Output B is better.")
  ' Output B is better.'
  >>> strip_thoughts("<think>Output A is better, I")
  """
  for tag, common in _TAGS.items():
    text = text.replace(tag, common)
  if "<|channel|>" in text or text.startswith("analysis"):
    channels = [*_CHANNEL.finditer(text)]
    if not channels and "<|channel|>" in text:
      return None
    text = text[channels[-1].end() :] if channels else text
  parts: list[str] = []
  start, open_tag = 0, ""
  for match in _THOUGHT.finditer(text):
    name = match[2].lower()
    if match[1] and open_tag in ("", name):
      parts, start = (parts if open_tag else []), match.end()
      open_tag = ""
    elif not match[1] and not open_tag:
      parts.append(text[start : match.start()])
      open_tag = name
  return None if open_tag else " ".join([*parts, text[start:]])


def extract_answer(text: str) -> str:
  """Returns the text in the last answer tag without thoughts; "" for an open thought.

  The text ends at the first end token, and contains no other tags.
  """
  answer = strip_thoughts(text) or ""
  tags = [*_ANSWER.finditer(answer)]
  if tags:
    answer = _ANSWER_END.split(answer[tags[-1].end() :], maxsplit=1)[0]
  answer = html.unescape(_END.split(answer, maxsplit=1)[0])
  return _OTHER_TAG.sub(" ", _LABEL_TAG.sub(r"\n\1: ", answer))


def clean_reply(text: str) -> str:
  r"""Returns the plain text of a reply; "" for an open thought.

  >>> clean_reply("<think>Hm.</think>**Verdict:** \\boxed{\\text{A}}")
  'Verdict: [[A]]'
  """
  answer = _FENCE.sub("", extract_answer(text))
  answer = unicodedata.normalize("NFKC", answer.translate(_CHARACTERS))
  for _ in range(2):  # \textbf{\text{A}}
    answer = _LATEX_TEXT.sub(r"\1", answer)
  answer = _BOX.sub(r"[[\1]]", answer)
  answer = re.sub(r"\\[()\[\],;]|\$|\*|__|^#{1,6} |~~[^~\n]{0,200}~~", "", answer)
  answer = re.sub(r"[^\S\n]+", " ", answer)
  return re.sub(r" ?\n[ \n]*", "\n", answer).strip()
