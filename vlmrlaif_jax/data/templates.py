"""Conversation templates, which format questions and answers as one text.

`render_conversation` is the main function. A "</s>" in a user's text is four
characters, while a "</s>" of the template is one token. The rendered text therefore
marks each special token of the template with two characters that no user text may
contain. `tokenization.encode_conversation` treats only marked tokens as special.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase

# Noncharacters, which Unicode reserves for internal use.
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # Around a special token of the template.
VIDEO_MARK = "\ufdd2"  # Position of a run of video features.
# A video as LLaVA's processors write it.
_LLAVA_VIDEO = VIDEO_MARK + "\n"
_HIDE, _SHOW = "\ufdd3", "\ufdd4"  # Around the index of a special token in user text.
MEDIA_MARK = "\ufdd5"  # Place of a video or an image in a question.
# Parts of a message that are a video or an image; see formats.messages.
PART_MARKS = {"video": "\ufdd6", "image": "\ufdd7"}
_IMAGE_PART = "<image>"  # What chat templates write for an image.
_NO_TEXT = re.compile("[\ud800-\udfff\ufdd0-\ufdd7]")
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # Some tokenizers mark byte tokens as special.


class TemplatePieces(NamedTuple):
  """A template as data: the texts around the turns."""

  system: str  # Text before the first turn.
  user: str  # Text before a question.
  assistant: str  # Text after a question; a generation prompt ends with it.
  lead: str  # Text before an answer that is not empty. The loss includes it.
  end: str  # Text after an answer. The loss includes it.
  between: str  # Text between an answer and the next turn.


class ChatTemplate(NamedTuple):
  """The checkpoint's own Jinja template, applied by the tokenizer."""


Template: TypeAlias = TemplatePieces | ChatTemplate
Turns: TypeAlias = Sequence[tuple[str, str | None]]  # (question, answer) pairs.
Script: TypeAlias = list[tuple[str, bool]]  # (text, whether the loss includes it).

_OF_USER, _OF_HUMAN = (
  f"A chat between a curious {who} and an artificial intelligence assistant. The "
  f"assistant gives helpful, detailed, and polite answers to the {who}'s questions."
  for who in ("user", "human")
)
_OF_QWEN = "You are a helpful assistant."
CONVERSATION_TEMPLATES: dict[str, Template] = {
  # The template on which LLaVA-1.5 and VLM-RLAIF were trained (Vicuna v1.1).
  "vicuna_v1": TemplatePieces(f"{_OF_USER} ", "USER: ", " ASSISTANT:", " ", "</s>", ""),
  # The template of VLM-RLAIF's evaluation for checkpoints with "v1" in their name.
  "llava_v1": TemplatePieces(f"{_OF_HUMAN} ", "USER: ", " ASSISTANT:", " ", "</s>", ""),
  # The template of VLM-RLAIF's evaluation for other checkpoints.
  "llava_v0": TemplatePieces(
    f"{_OF_HUMAN}###", "Human: ", "###Assistant:", " ", "###", ""
  ),
  # ChatML with the system text of Qwen2 and of LLaVA-NeXT's Qwen models.
  "qwen": TemplatePieces(
    f"<|im_start|>system\n{_OF_QWEN}<|im_end|>\n",
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "",
    "<|im_end|>",
    "\n",
  ),
  # Vicuna's turns without the system text, for very small models.
  "brief": TemplatePieces("", "USER: ", " ASSISTANT:", " ", "</s>", ""),
  "chat_template": ChatTemplate(),
}


def get_template(name: str) -> Template:
  """Returns a template by its name in CONVERSATION_TEMPLATES.

  Raises:
    ValueError: No template has this name.
  """
  if name not in CONVERSATION_TEMPLATES:
    raise ValueError(
      f"template must be one of {sorted(CONVERSATION_TEMPLATES)}, not {name!r}"
    )
  return CONVERSATION_TEMPLATES[name]


def split_system(pieces: TemplatePieces) -> tuple[str, str]:
  """Returns the texts before and after a system prompt of the user's own.

  It replaces the template's system prompt. In a template without one, a space follows.
  """
  for text in (_OF_USER, _OF_HUMAN, _OF_QWEN):
    if text in pieces.system:
      start, _, end = pieces.system.partition(text)
      return start, end
  return "", " "


@functools.lru_cache
def get_special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
  """Returns the ids of the special tokens by their text.

  User text never yields these ids. The result is cached, because the tokens of a
  tokenizer do not change once it is in use.
  """
  added = tokenizer.added_tokens_decoder.items()
  return {
    token.content: i
    for i, token in added
    if token.special and not _BYTE.fullmatch(token.content)
  }


@functools.lru_cache
def _compile_special(tokenizer) -> re.Pattern:
  """Compiles a pattern of all special tokens, which prefers the longest match."""
  longest_first = sorted(get_special_tokens(tokenizer), key=len, reverse=True)
  return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def mark_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
  """Marks the special tokens of a template's text with OPEN and CLOSE."""
  return _compile_special(tokenizer).sub(lambda match: OPEN + match[0] + CLOSE, text)


def check_plain_text(text: str) -> str:
  """Returns a text unchanged after a check of its characters.

  Raises:
    ValueError: The text contains a lone surrogate or a noncharacter.
  """
  match = _NO_TEXT.search(text)
  if match:
    raise ValueError(
      f"U+{ord(match[0]):04X} at index {match.start()} of a text is not a character "
      f"(a lone surrogate or a noncharacter): replace it, for example by U+FFFD"
    )
  return text


def show_media(text: str, names: Sequence[str] = ()) -> str:
  """Returns a question with names instead of the marks of its videos and images.

  >>> show_media(f"Is {MEDIA_MARK} longer than {MEDIA_MARK}?", ["<video>", "<image>"])
  'Is <video> longer than <image>?'

  Args:
    text: A question.
    names: A name for each mark, in order; the default is "<video>".
  """
  first, *others = text.split(MEDIA_MARK)
  names = names or ["<video>"] * len(others)
  return first + "".join(a + b for a, b in zip(names, others, strict=True))


def get_end_text(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
  """Returns the text that a template puts directly after an answer.

  Raises:
    ValueError: A chat template puts no special token after the answer.
  """
  if isinstance(template, TemplatePieces):
    return template.end
  rendered = _apply_chat_template(tokenizer, [("", VIDEO_MARK)])
  after = rendered.partition(VIDEO_MARK)[2]
  end = _compile_special(tokenizer).search(after)
  if not end:
    raise ValueError(
      "the tokenizer's chat template must put a special token after an answer, but it "
      f"puts {after!r} there: set --config.model.template to another one of "
      f"{sorted(CONVERSATION_TEMPLATES)}"
    )
  return end[0]


def render_conversation(
  tokenizer: PreTrainedTokenizerBase,
  template: Template,
  turns: Turns,
  *,
  videos: Sequence[str],
  system: str | None = None,
) -> Script:
  """Renders a conversation up to the end of its last answer.

  Args:
    tokenizer: Tokenizer whose special tokens are marked.
    template: Conversation template.
    turns: Questions and answers, from which outer white space is stripped. The first
      answer of None ends the conversation with an open generation prompt.
    videos: Text of each video and image. It has VIDEO_MARK for each run of features,
      and its special tokens are marked. The texts replace the MEDIA_MARKs of the
      questions in order. Without marks, they precede the first question.
    system: System prompt, from which outer white space is stripped; None for that of
      the template.

  Returns:
    Parts of the text, each with whether the loss includes it.

  Raises:
    ValueError: The tokenizer's chat template does not support such conversations, or
      the questions have another number of marks than there are videos.
  """
  count = next((i for i, turn in enumerate(turns, 1) if turn[1] is None), len(turns))
  questions = _insert_videos([question for question, _ in turns[:count]], videos)
  answers = [answer and check_plain_text(answer).strip() for _, answer in turns[:count]]
  plain = list(zip(questions, answers, strict=True))
  if system is not None:
    system = check_plain_text(system).strip()
  if isinstance(template, TemplatePieces):
    return _render_pieces(tokenizer, template, plain, system)
  return _render_chat(tokenizer, template, plain, system)


def _insert_videos(questions: Sequence[str], videos: Sequence[str]) -> list[str]:
  """Returns questions with the texts of videos at their places."""
  for question in questions:
    check_plain_text(question.replace(MEDIA_MARK, ""))
  stripped = [question.strip() for question in questions]
  marks = sum(question.count(MEDIA_MARK) for question in stripped)
  if not marks and stripped:
    return ["".join(videos) + stripped[0], *stripped[1:]]
  if marks != len(videos):
    raise ValueError(
      f"the questions have the places of {marks} videos and images, but there are "
      f"{len(videos)}. Give one for each place."
    )
  texts = iter(videos)
  return [
    show_media(question, [next(texts) for _ in range(question.count(MEDIA_MARK))])
    for question in stripped
  ]


def _render_pieces(tokenizer, template, turns, system) -> Script:
  mark = functools.partial(mark_special_tokens, tokenizer)
  start, user, assistant, lead, end, between = map(mark, template)
  if system is not None:
    before, after = map(mark, split_system(template))
    start = (before + system + after).lstrip()
  script = [(start, False)]
  for i, (question, answer) in enumerate(turns):
    script.append(((between if i else "") + user + question + assistant, False))
    if answer is not None:
      # An empty answer is only its end. The loss includes the lead, which may be a
      # token of its own that a prompt does not end with.
      script.append(((lead + answer if answer else "") + end, True))
  return script


def _render_chat(tokenizer, template, turns, system) -> Script:
  """Renders turns with the tokenizer's template and locates the answers by prefixes.

  An answer starts at the end of its prompt and stops at the next end token. Special
  tokens in user text are hidden from Jinja, so that an answer contains no end token.
  """
  special = list(get_special_tokens(tokenizer))
  hide = lambda text: _compile_special(tokenizer).sub(
    lambda match: f"{_HIDE}{special.index(match[0])}{_SHOW}", text
  )
  show = lambda text: re.sub(
    f"{_HIDE}(\\d+){_SHOW}",
    lambda match: special[int(match[1])],
    mark_special_tokens(tokenizer, text),
  )
  turns = [(hide(question), answer and hide(answer)) for question, answer in turns]
  system = system and hide(system)
  whole = _apply_chat_template(tokenizer, turns, system)
  end = get_end_text(tokenizer, template)
  script, at = [], 0
  for i, (question, answer) in enumerate(turns):
    prefix = _apply_chat_template(tokenizer, [*turns[:i], (question, None)], system)
    stop = at if answer is None else whole.find(end, len(prefix)) + len(end)
    prompt, response = whole[at : len(prefix)], whole[len(prefix) : stop]
    is_prefix = whole.startswith(prefix) and question in prompt
    if not (is_prefix and (answer or "") in response):
      raise ValueError(
        f"the tokenizer's chat template does not render turn {i + 1} of {len(turns)} "
        "as its prompt, its answer and an end token, which training requires: set "
        f"--config.model.template to another one of {sorted(CONVERSATION_TEMPLATES)}"
      )
    script.append((show(prompt), False))
    if answer is not None:
      # An empty answer is only its end, as in `_render_pieces`.
      script.append((show(response if answer else end), True))
      at = stop
  return script


def _apply_chat_template(tokenizer, turns, system=None) -> str:
  """Renders turns with Jinja, with a generation prompt if the last answer is None."""
  messages = [] if system is None else [("system", system)]
  for question, answer in turns:
    messages.append(("user", question))
    if answer is not None:
      messages.append(("assistant", answer))
  if tokenizer.chat_template is None:
    raise ValueError(
      "template is chat_template, but the tokenizer has none: set "
      f"--config.model.template to another one of {sorted(CONVERSATION_TEMPLATES)}, or "
      "add chat_template.jinja to the tokenizer's folder"
    )
  has_parts = _reads_parts(tokenizer)
  rendered = tokenizer.apply_chat_template(
    [_make_message(role, text, has_parts) for role, text in messages],
    tokenize=False,
    add_generation_prompt=messages[-1][0] == "user",
  )
  if not has_parts:
    return rendered
  if any(text.startswith(_LLAVA_VIDEO) for _, text in messages):
    rendered = rendered.replace(_find_video_token(tokenizer), VIDEO_MARK)
  return rendered.replace(_IMAGE_PART + OPEN, OPEN)


@functools.lru_cache
def _reads_parts(tokenizer) -> bool:
  """Returns whether a chat template skips messages that are no list of parts."""
  message = _make_message("user", VIDEO_MARK, has_parts=False)
  return VIDEO_MARK not in tokenizer.apply_chat_template([message], tokenize=False)


def _make_message(role: str, text: str, has_parts: bool) -> dict[str, Any]:
  """Returns a message of a chat template.

  A template of parts writes the line break after a video of LLaVA. A text that begins
  with a special token is that of an image. Such templates may write no space before an
  image, so that it has a part of its own.
  """
  if not has_parts:
    return {"role": role, "content": text}
  if text.startswith(_LLAVA_VIDEO):
    rest = {"type": "text", "text": text.removeprefix(_LLAVA_VIDEO)}
    return {"role": role, "content": [{"type": "video"}, rest]}
  image = [{"type": "image"}] if text.startswith(OPEN) else []
  return {"role": role, "content": [*image, {"type": "text", "text": text}]}


@functools.lru_cache
def _find_video_token(tokenizer) -> str:
  """Returns the special token that a chat template of parts writes for a video.

  Raises:
    ValueError: It writes none, or several.
  """
  with_video, without = (
    tokenizer.apply_chat_template(
      [_make_message("user", text, has_parts=True)], tokenize=False
    )
    for text in (_LLAVA_VIDEO, "")
  )
  written = [
    token
    for token in get_special_tokens(tokenizer)
    if with_video.count(token) > without.count(token)
  ]
  if len(written) != 1:
    raise ValueError(
      "the tokenizer's chat template must write one special token for a video, but it "
      f"writes {written}: set --config.model.template to another one of "
      f"{sorted(CONVERSATION_TEMPLATES)}"
    )
  return written[0]
