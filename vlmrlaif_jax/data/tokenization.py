"""Text to token ids: tokenizers, video tokens, masks, padding.

Every row is laid out the same way: the prompt, padded on the left to one length,
then the response, padded on the right to another. Rows of one shape need one
compilation, and a response always begins at the same index.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import templates
from vlmrlaif_jax.data.templates import CONVERSATION_TEMPLATES as CONVERSATION_TEMPLATES
from vlmrlaif_jax.data.templates import Template as Template
from vlmrlaif_jax.data.templates import get_template as get_template


class EncodedConversation(NamedTuple):
  """Token ids of one conversation, and which of them are to be learned."""

  ids: list[int]  # VIDEO_TOKEN stands once for each video feature.
  learn: list[bool]  # True for answers and the end token after each.


class TokenRows(NamedTuple):
  """Encoded conversations as arrays; see Batch."""

  tokens: Int[np.ndarray, "batch time"]
  mask: Bool[np.ndarray, "batch time"]
  loss_mask: Bool[np.ndarray, "batch time"]


def load_tokenizer(path: str | pathlib.Path) -> PreTrainedTokenizerBase:
  """The tokenizer of a Hugging Face folder, with a pad token.

  Where the folder names none, unk is pad, as in LLaVA. Masks say what is padding, so
  an unk in a text stays.

  Raises:
    ValueError: the tokenizer does not tell where in a text a token stands, or it has
      neither a pad token nor unk.
  """
  if not pathlib.Path(path).is_dir():
    raise FileNotFoundError(f"no tokenizer folder at {path}")
  tokenizer = AutoTokenizer.from_pretrained(str(path))
  if not tokenizer.is_fast:
    raise ValueError(
      f"the {type(tokenizer).__name__} of {path} does not tell where in a text a token "
      "stands, which masks are made from: give a folder with a tokenizer.json"
    )
  if tokenizer.pad_token is None:
    if tokenizer.unk_token is None:
      raise ValueError(
        f"the tokenizer of {path} has neither a pad token nor an unk token: name a "
        'special token that no text uses as "pad_token" in its tokenizer_config.json'
      )
    tokenizer.pad_token = tokenizer.unk_token
  return tokenizer


def find_eos_id(tokenizer: PreTrainedTokenizerBase, template: Template) -> int:
  """The token that ends an answer: where sampling stops.

  Raises:
    ValueError: answers end in a text that is not one special token of the tokenizer.
  """
  end = templates.get_end_text(tokenizer, template)
  special = templates.get_special_tokens(tokenizer)
  if end not in special:
    raise ValueError(
      f"the template ends answers with {end!r}, which is no special token of the "
      f"tokenizer (those are {sorted(special)[:8]}), so sampling has nowhere to stop: "
      "take the template that the checkpoint was trained on"
    )
  return special[end]


def encode_conversation(
  tokenizer: PreTrainedTokenizerBase,
  template: Template,
  turns: Sequence[tuple[str, str | None]],
  *,
  video_tokens: int,
) -> EncodedConversation:
  """Token ids of a conversation about a video, which stands before the first question.

  Args:
    turns: (question, answer) pairs. A last answer of None leaves the conversation
      open for a model to go on.
    video_tokens: how many features the video has; 0 for text alone.

  The text before and after the video is tokenized each by itself, as LLaVA does.
  What is learned follows from where answers stand in the text, never from counting
  tokens of a prefix. A "<video>" or "</s>" inside a question is plain text. The
  tokenizer's bos comes first, if it has one; a chat template writes its own.
  """
  script = templates.render_conversation(
    tokenizer, template, turns, has_video=video_tokens > 0
  )
  whole = "".join(said for said, _ in script)
  answers = [learn for said, learn in script for _ in said]  # Of each character.
  if whole.count(templates.VIDEO_MARK) != (video_tokens > 0):
    raise ValueError(
      "the tokenizer's chat template does not write the first question just once, so "
      f"the video has no place: take another of {sorted(CONVERSATION_TEMPLATES)}"
    )
  bos = tokenizer.bos_token_id
  has_bos = bos is not None and not isinstance(template, templates.ChatTemplate)
  ids, learn = ([bos], [False]) if has_bos else ([], [])
  at = 0
  for part in whole.split(templates.VIDEO_MARK):
    if at:
      ids += [VIDEO_TOKEN] * video_tokens
      learn += [False] * video_tokens
    part_ids, offsets = _tokens(tokenizer, part)
    ids += part_ids
    learn += [any(answers[at + a : at + b]) for a, b in offsets]
    at += len(part) + 1
  return EncodedConversation(ids, learn)


def _tokens(tokenizer, marked):
  """(ids, spans) of a text in which special tokens stand as `templates.mark` does."""
  out = _reader(tokenizer).encode(marked, add_special_tokens=False)
  return out.ids, out.offsets


@functools.lru_cache
def _reader(tokenizer) -> tokenizers.Tokenizer:
  """The same tokenizer, but its special tokens go by names that nobody can type.

  The text between special tokens is read as ever, with each tokenizer's own rules
  for spaces around them. Tokenizing part by part would change ids, and telling a
  tokenizer to split special tokens is not enough: its merges may spell one.
  """
  spec = json.loads(tokenizer.backend_tokenizer.to_str())
  special = templates.get_special_tokens(tokenizer)
  name = lambda token: (
    templates.mark_special_tokens(tokenizer, token) if token in special else token
  )
  model = spec["model"]
  if isinstance(model["vocab"], dict):
    model["vocab"] = {name(token): i for token, i in model["vocab"].items()}
  else:  # A Unigram model's; the place in the list is the id.
    model["vocab"] = [(name(token), score) for token, score in model["vocab"]]
  if model.get("unk_token"):
    model["unk_token"] = name(model["unk_token"])
  if "merges" in model:
    merges = model["merges"]
    model["merges"] = [m for m in merges if special.keys().isdisjoint([*m, "".join(m)])]
  # Those that are special in name only, the bytes, are then just words of the model.
  spec["added_tokens"] = [
    {**token, "content": name(token["content"])}
    for token in spec["added_tokens"]
    if token["content"] in special or not token["special"]
  ]
  # A post-processor may leave spaces out of the spans of tokens, and so of the mask.
  spec["post_processor"] = spec["truncation"] = spec["padding"] = None
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def encode_suffix(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
  """Ids of text that goes on after an answer's end token, as the reward prompt does.

  Special tokens in it are special: it is a template's text, not a user's.
  """
  before = templates.mark_special_tokens(tokenizer, tokenizer.eos_token)
  marked = templates.mark_special_tokens(tokenizer, templates.check_plain_text(text))
  return _tokens(tokenizer, before + marked)[0][1:]


def split_response(
  encoded: EncodedConversation, at: int | None = None
) -> tuple[list[int], list[int], list[bool]]:
  """(prompt, response, learn of the response); unless `at` says where the response
  starts, that is the first id to be learned, and it is empty where there is none.
  """
  if at is None:
    at = encoded.learn.index(True) if any(encoded.learn) else len(encoded.ids)
  return encoded.ids[:at], encoded.ids[at:], encoded.learn[at:]


def pad_rows(
  rows: Sequence[EncodedConversation],
  *,
  prompt_len: int,
  response_len: int,
  pad: int,
  starts: Sequence[int] | None = None,
) -> TokenRows:
  """Conversations as arrays of prompt_len + response_len columns.

  Args:
    starts: of the responses, if not at the first ids to be learned.

  Raises:
    ValueError: a prompt or a response longer than that; `fits` tells beforehand.
  """
  time = prompt_len + response_len
  tokens = np.full((len(rows), time), pad, np.int32)
  mask, loss_mask = np.zeros((2, len(rows), time), bool)
  for i, row in enumerate(rows):
    prompt, response, learn = split_response(row, starts[i] if starts else None)
    if len(prompt) > prompt_len or len(response) > response_len:
      raise ValueError(
        f"row {i}: prompt of {len(prompt)} and response of {len(response)} tokens, "
        f"but prompt_len={prompt_len} and response_len={response_len}"
      )
    start, stop = prompt_len - len(prompt), prompt_len + len(response)
    tokens[i, start:stop] = prompt + response
    mask[i, start:stop] = True
    loss_mask[i, prompt_len:stop] = learn
  return TokenRows(tokens, mask, loss_mask)


def is_within_lengths(
  row: EncodedConversation, *, prompt_len: int, response_len: int
) -> bool:
  """Whether `pad_rows` takes a row."""
  prompt, response, _ = split_response(row)
  return len(prompt) <= prompt_len and len(response) <= response_len


def round_up_length(length: int, *, multiple: int) -> int:
  """The smallest multiple that length fits in: few shapes, few compilations."""
  return -(-length // multiple) * multiple


def decode_responses(
  tokenizer: PreTrainedTokenizerBase,
  tokens: Int[np.ndarray, "batch time"],
  loss_mask: Bool[np.ndarray, "batch time"],
) -> list[str]:
  """The text of each row's response, without special tokens."""
  special = list(templates.get_special_tokens(tokenizer).values())
  keep = loss_mask & ~np.isin(tokens, special)
  texts = tokenizer.batch_decode([row[k] for row, k in zip(tokens, keep, strict=True)])
  return [text.strip() for text in texts]
