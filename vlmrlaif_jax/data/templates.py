"""Conversation templates: how questions and answers are written out as one text.

A "</s>" that somebody typed is four characters; the one that a template writes is one
token. So a script holds each special token of the template between two characters
that no text may hold, and `tokenization.encode` reads only those as special.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase

# Noncharacters: Unicode keeps them for the inside of programs.
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # Around a special token that a template writes.
VIDEO_MARK = "\ufdd2"  # Where the video goes.
_HIDE, _SHOW = "\ufdd3", "\ufdd4"  # Around the number of one that somebody typed.
_NO_TEXT = re.compile("[\ud800-\udfff\ufdd0-\ufdd4]")
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # Some tokenizers call these special.


class TemplatePieces(NamedTuple):
  """A template as data: the texts that stand around the turns."""

  system: str  # Before the first turn.
  user: str  # Before what the user says.
  assistant: str  # After it; a generation prompt ends here.
  lead: str  # Before an answer that is not empty; learned with it.
  end: str  # After an answer; learned with it.
  between: str  # After that, if another turn follows.


class ChatTemplate(NamedTuple):
  """The checkpoint's own template: jinja, by the tokenizer's apply_chat_template."""


Template: TypeAlias = TemplatePieces | ChatTemplate
Turns: TypeAlias = Sequence[tuple[str, str | None]]  # (question, answer) pairs.
Script: TypeAlias = list[tuple[str, bool]]  # (text, whether it is to be learned).

_OF_USER, _OF_HUMAN = (
  f"A chat between a curious {who} and an artificial intelligence assistant. The "
  f"assistant gives helpful, detailed, and polite answers to the {who}'s questions."
  for who in ("user", "human")
)
CONVERSATION_TEMPLATES: dict[str, Template] = {
  # What LLaVA-1.5 and VLM-RLAIF were trained on (Vicuna v1.1).
  "vicuna_v1": TemplatePieces(f"{_OF_USER} ", "USER: ", " ASSISTANT:", " ", "</s>", ""),
  # What VLM-RLAIF's evaluation takes if a checkpoint's name holds "v1" ...
  "llava_v1": TemplatePieces(f"{_OF_HUMAN} ", "USER: ", " ASSISTANT:", " ", "</s>", ""),
  # ... and if it does not.
  "llava_v0": TemplatePieces(
    f"{_OF_HUMAN}###", "Human: ", "###Assistant:", " ", "###", ""
  ),
  # ChatML with the system text of Qwen2 and of LLaVA-NeXT's Qwen models.
  "qwen": TemplatePieces(
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "",
    "<|im_end|>",
    "\n",
  ),
  # Vicuna's turns without the system text: for models of very few parameters.
  "brief": TemplatePieces("", "USER: ", " ASSISTANT:", " ", "</s>", ""),
  "chat_template": ChatTemplate(),
}


def get_template(name: str) -> Template:
  if name not in CONVERSATION_TEMPLATES:
    raise ValueError(
      f"template must be one of {sorted(CONVERSATION_TEMPLATES)}, not {name!r}"
    )
  return CONVERSATION_TEMPLATES[name]


@functools.lru_cache
def get_special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
  """Text -> id of the special tokens, which text that people wrote never yields.

  Kept, as all that follows from it: a tokenizer in use gets no further tokens.
  """
  added = tokenizer.added_tokens_decoder.items()
  return {
    token.content: i
    for i, token in added
    if token.special and not _BYTE.fullmatch(token.content)
  }


@functools.lru_cache
def _special(tokenizer) -> re.Pattern:
  """Any special token; where several begin, the longest."""
  longest_first = sorted(get_special_tokens(tokenizer), key=len, reverse=True)
  return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def mark_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
  """A text of a template, its special tokens between OPEN and CLOSE."""
  return _special(tokenizer).sub(lambda found: OPEN + found[0] + CLOSE, text)


def check_plain_text(text: str) -> str:
  """A text as it is, if it is one.

  Raises:
    ValueError: it holds a lone surrogate, or a noncharacter that marks things here.
  """
  found = _NO_TEXT.search(text)
  if found:
    raise ValueError(
      f"U+{ord(found[0]):04X} at index {found.start()} of a text is not a character "
      f"(a lone surrogate or a noncharacter): replace it, for example by U+FFFD"
    )
  return text


def get_end_text(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
  """What a template writes right after an answer."""
  if isinstance(template, TemplatePieces):
    return template.end
  written = _rendered(tokenizer, [("", VIDEO_MARK)])
  after = written.partition(VIDEO_MARK)[2]
  end = _special(tokenizer).search(after)
  if not end:
    raise ValueError(
      "the tokenizer's chat template does not write an answer and a special token "
      f"after it (it writes {after!r} there): take another of {sorted(CONVERSATION_TEMPLATES)}"
    )
  return end[0]


def render_conversation(
  tokenizer: PreTrainedTokenizerBase,
  template: Template,
  turns: Turns,
  *,
  has_video: bool,
) -> Script:
  """A conversation written out, up to the end of its last answer.

  Args:
    turns: stripped of white space at both ends; up to the first answer of None, after
      whose question a model is to go on.
    has_video: whether VIDEO_MARK and a new line stand before the first question.
  """
  said, video = [], f"{VIDEO_MARK}\n" if has_video else ""
  for question, answer in turns:
    asked = video + check_plain_text(question).strip()
    said.append((asked, answer and check_plain_text(answer).strip()))
    video = ""
    if answer is None:
      break
  if isinstance(template, TemplatePieces):
    return _write_pieces(tokenizer, template, said)
  return _write_chat(tokenizer, template, said)


def _write_pieces(tokenizer, template, turns) -> Script:
  system, user, assistant, lead, end, between = (
    mark_special_tokens(tokenizer, p) for p in template
  )
  script = [(system, False)]
  for i, (question, answer) in enumerate(turns):
    script.append(((between if i else "") + user + question + assistant, False))
    if answer is not None:
      # A policy that has nothing to say ends at once. The lead is learned: it may be
      # a token of its own, and then a prompt does not end in it.
      script.append(((lead + answer if answer else "") + end, True))
  return script


def _write_chat(tokenizer, template, turns) -> Script:
  """By prefixes: an answer begins where the prompt of the turns up to it ends.

  It goes up to the first end token of the template after that: no such token is of
  the answer itself, since what people wrote is hidden while jinja writes.
  """
  typed = list(get_special_tokens(tokenizer))
  hide = lambda text: _special(tokenizer).sub(
    lambda found: f"{_HIDE}{typed.index(found[0])}{_SHOW}", text
  )
  show = lambda text: re.sub(
    f"{_HIDE}(\\d+){_SHOW}",
    lambda found: typed[int(found[1])],
    mark_special_tokens(tokenizer, text),
  )
  turns = [(hide(question), answer and hide(answer)) for question, answer in turns]
  whole, end = _rendered(tokenizer, turns), get_end_text(tokenizer, template)
  script, at = [], 0
  for i, (question, answer) in enumerate(turns):
    prompt = _rendered(tokenizer, [*turns[:i], (question, None)])
    stop = at if answer is None else whole.find(end, len(prompt)) + len(end)
    asked, said = whole[at : len(prompt)], whole[len(prompt) : stop]
    if not (whole.startswith(prompt) and question in asked and (answer or "") in said):
      raise ValueError(
        f"the tokenizer's chat template does not write turn {i + 1} of {len(turns)} as "
        "its prompt, the answer and its end, so what was sampled could not be learned: "
        f"take another of {sorted(CONVERSATION_TEMPLATES)}"
      )
    script.append((show(asked), False))
    if answer is not None:
      # As in `_write_pieces`: who has nothing to say ends at once.
      script.append((show(said if answer else end), True))
      at = stop
  return script


def _rendered(tokenizer, turns) -> str:
  """What jinja writes; open for an answer if the last one is None."""
  messages = []
  for question, answer in turns:
    messages.append({"role": "user", "content": question})
    if answer is not None:
      messages.append({"role": "assistant", "content": answer})
  if tokenizer.chat_template is None:
    raise ValueError(
      "template is chat_template, but the tokenizer has none: take another of "
      f"{sorted(CONVERSATION_TEMPLATES)}, or add chat_template.jinja to its folder"
    )
  open_ended = messages[-1]["role"] == "user"
  return tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=open_ended
  )
