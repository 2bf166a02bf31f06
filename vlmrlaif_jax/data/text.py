"""Text to token ids: conversation templates, video tokens, masks, padding.

Every row is laid out the same way: the prompt, padded on the left to one length,
then the response, padded on the right to another. Rows of one shape need one
compilation, and a response always begins at the same index.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlmrlaif_jax.types import VIDEO_TOKEN


class Template(NamedTuple):
  """How a conversation is written out; the texts stand around its turns."""

  system: str  # Before the first turn.
  user: str  # Before what the user says.
  assistant: str  # Before an answer; a generation prompt ends here.
  end: str  # After an answer.


TEMPLATES = {
  # What LLaVA-1.5 and VLM-RLAIF were trained on (Vicuna v1.1).
  "vicuna_v1": Template(
    "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. ",
    "USER: ",
    " ASSISTANT:",
    "</s>",
  ),
  # The same turns without the system text: for models of very few parameters.
  "brief": Template("", "USER: ", " ASSISTANT:", "</s>"),
}


class Encoded(NamedTuple):
  """Token ids of one conversation, and which of them are to be learned."""

  ids: list[int]  # VIDEO_TOKEN stands once for each video feature.
  learn: list[bool]  # True for answers and the end token after each.


class Rows(NamedTuple):
  """Encoded conversations as arrays; see Batch."""

  tokens: Int[np.ndarray, "batch time"]
  mask: Bool[np.ndarray, "batch time"]
  loss_mask: Bool[np.ndarray, "batch time"]


class TooLong(ValueError):
  """A conversation that does not fit the lengths a config gives."""


def load_tokenizer(path: str | pathlib.Path) -> PreTrainedTokenizerBase:
  """The tokenizer of a Hugging Face folder."""
  if not pathlib.Path(path).is_dir():
    raise FileNotFoundError(f"no tokenizer folder at {path}")
  return AutoTokenizer.from_pretrained(str(path))


def template_named(name: str) -> Template:
  if name not in TEMPLATES:
    raise ValueError(f"template must be one of {sorted(TEMPLATES)}, not {name!r}")
  return TEMPLATES[name]


def encode(
  tokenizer: PreTrainedTokenizerBase,
  template: Template,
  turns: Sequence[tuple[str, str | None]],
  *,
  video_tokens: int,
) -> Encoded:
  """Token ids of a conversation about a video, which stands before the first turn.

  Args:
    turns: (question, answer) pairs. A last answer of None leaves the conversation
      open for a model to go on.
    video_tokens: how many features the video has; 0 for text alone.

  The text before and after the video is tokenized each by itself, as LLaVA does.
  What is learned follows from where answers stand in the text, never from counting
  tokens of a prefix. A "<video>" inside a question is plain text.
  """
  head, body, spans = _write(template, turns, has_video=video_tokens > 0)
  ids = [tokenizer.bos_token_id, *_tokens(tokenizer, head)[0]]
  ids += [VIDEO_TOKEN] * video_tokens
  learn = [False] * len(ids)
  body_ids, offsets = _tokens(tokenizer, body)
  inside = lambda start, stop: any(stop > a and start < b for a, b in spans)
  return Encoded(ids + body_ids, learn + [inside(*o) for o in offsets])


def _write(template, turns, *, has_video):
  """(text before the video, text after it, spans of answers in the latter)."""
  head = template.system + template.user if has_video else ""
  body, spans = ("\n" if has_video else template.system + template.user), []
  for i, (question, answer) in enumerate(turns):
    body += (template.user if i else "") + question.strip() + template.assistant
    if answer is None:
      break
    start, said = len(body), answer.strip()
    # A policy that has nothing to say ends at once, without the space.
    body += f" {said}{template.end}" if said else template.end
    # With the space: it may be a token of its own, which a prompt does not end in.
    spans.append((start, len(body)))
  return head, body, spans


def _tokens(tokenizer, text):
  out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
  return out["input_ids"], out["offset_mapping"]


def suffix_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
  """Ids of text that goes on after an answer's end token, as the reward prompt does."""
  return _tokens(tokenizer, text)[0]


def split_response(encoded: Encoded) -> tuple[list[int], list[int], list[bool]]:
  """(prompt, response, learn of the response); the response starts at the first
  id to be learned, and is empty where there is none."""
  at = encoded.learn.index(True) if any(encoded.learn) else len(encoded.ids)
  return encoded.ids[:at], encoded.ids[at:], encoded.learn[at:]


def pad_rows(
  rows: Sequence[Encoded], *, prompt_len: int, response_len: int, pad: int
) -> Rows:
  """Conversations as arrays of prompt_len + response_len columns.

  Raises:
    TooLong: a prompt or a response longer than that; `fits` tells beforehand.
  """
  time = prompt_len + response_len
  tokens = np.full((len(rows), time), pad, np.int32)
  mask, loss_mask = np.zeros((2, len(rows), time), bool)
  for i, row in enumerate(rows):
    prompt, response, learn = split_response(row)
    if len(prompt) > prompt_len or len(response) > response_len:
      raise TooLong(
        f"row {i}: prompt of {len(prompt)} and response of {len(response)} tokens, "
        f"but prompt_len={prompt_len} and response_len={response_len}"
      )
    start, stop = prompt_len - len(prompt), prompt_len + len(response)
    tokens[i, start:stop] = prompt + response
    mask[i, start:stop] = True
    loss_mask[i, prompt_len:stop] = learn
  return Rows(tokens, mask, loss_mask)


def fits(row: Encoded, *, prompt_len: int, response_len: int) -> bool:
  """Whether `pad_rows` takes a row."""
  prompt, response, _ = split_response(row)
  return len(prompt) <= prompt_len and len(response) <= response_len


def bucket(length: int, *, multiple: int) -> int:
  """The smallest multiple that length fits in: few shapes, few compilations."""
  return -(-length // multiple) * multiple


def responses_text(
  tokenizer: PreTrainedTokenizerBase,
  tokens: Int[np.ndarray, "batch time"],
  loss_mask: Bool[np.ndarray, "batch time"],
) -> list[str]:
  """The text of each row's response, without special tokens."""
  kept = [row[keep] for row, keep in zip(tokens, loss_mask, strict=True)]
  texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
  return [text.strip() for text in texts]
