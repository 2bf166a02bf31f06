"""Tokenization of conversations: token ids, video tokens, positions, masks, padding.

`encode_conversation` returns the ids of one conversation. `pad_rows` builds arrays of
many. A row is the prompt, padded on the left to one length, and the response, padded on
the right to another. Responses therefore start at the same index in all rows, and one
shape needs one compilation.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from vlmrlaif_jax.core.files import check_readable, read_json
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import templates
from vlmrlaif_jax.data.processors.interface import NO_VIDEO, VideoTokens, make_positions
from vlmrlaif_jax.data.templates import CONVERSATION_TEMPLATES as CONVERSATION_TEMPLATES
from vlmrlaif_jax.data.templates import Template as Template
from vlmrlaif_jax.data.templates import get_template as get_template

# Characters by which the steps of a tokenizer may replace one.
MAX_GROWTH = 65_536


class EncodedConversation(NamedTuple):
  """The token ids of one conversation, with their loss mask and positions."""

  ids: list[int]  # Contains VIDEO_TOKEN once per video feature.
  learn: list[bool]  # True for answers and the end token after each of them.
  positions: Int[np.ndarray, "tokens axes"]  # See Batch.

  def truncate(self, length: int) -> "EncodedConversation":
    """Returns the first `length` tokens."""
    ids, learn, positions = self
    return EncodedConversation(ids[:length], learn[:length], positions[:length])


class TokenRows(NamedTuple):
  """Encoded conversations as arrays; see Batch."""

  tokens: Int[np.ndarray, "batch time"]
  mask: Bool[np.ndarray, "batch time"]
  loss_mask: Bool[np.ndarray, "batch time"]
  positions: Int[np.ndarray, "batch time axes"]


def load_tokenizer(path: str | pathlib.Path) -> PreTrainedTokenizerBase:
  """Loads the tokenizer of a Hugging Face folder.

  A chat template may be in chat_template.json, which transformers 4 wrote. If no pad
  token is defined, the unk token is used, as in LLaVA, or the EOS token, as in Llama 3.
  Padding is identified by masks, so such a token in a text has no side effect.

  Raises:
    FileNotFoundError: The folder does not exist.
    ValueError: The tokenizer returns no offsets of tokens, or it has no pad, unk or
      EOS token, or a file exceeds a limit.
  """
  if not pathlib.Path(path).is_dir():
    raise FileNotFoundError(f"no tokenizer folder at {path}")
  _check_files(pathlib.Path(path))
  tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
  if not tokenizer.is_fast:
    raise ValueError(
      f"the {type(tokenizer).__name__} of {path} does not return offsets of tokens, "
      "which masks require: use a folder with a tokenizer.json"
    )
  legacy = pathlib.Path(path) / "chat_template.json"
  if tokenizer.chat_template is None and legacy.is_file():
    tokenizer.chat_template = read_json(legacy)["chat_template"]
  if tokenizer.pad_token is None:
    pad = tokenizer.unk_token or tokenizer.eos_token
    if pad is None:
      raise ValueError(
        f"the tokenizer of {path} has no pad, unk or EOS token: set "
        '"pad_token" in its tokenizer_config.json to a special token that no text uses'
      )
    tokenizer.pad_token = pad
  return tokenizer


def _check_files(folder: pathlib.Path) -> None:
  """Checks that the files of a tokenizer end, and that no text grows without bound.

  Raises:
    ValueError: A file is a pipe or device, is too large, is not JSON, or has steps that
      together replace a character by more than MAX_GROWTH.
  """
  for file in folder.iterdir():
    if not (file.is_file() or file.is_dir()) or file.suffix in (".json", ".model"):
      check_readable(file)
  spec = read_json(folder / "tokenizer.json", default={})
  growth, todo = 1.0, [spec]
  while todo:
    part = todo.pop()
    if isinstance(part, list):
      todo += part
    elif isinstance(part, dict):
      todo += [x for key, x in part.items() if key != "vocab"]
      growth *= _measure_growth(part)
  if growth > MAX_GROWTH:
    raise ValueError(
      f"{folder / 'tokenizer.json'}: its Replace steps may replace a character by "
      f"{growth:.0f}; the limit is {MAX_GROWTH}. Give another tokenizer."
    )


def _measure_growth(part: dict[str, Any]) -> float:
  """Returns by how many characters a step of tokenizer.json may replace one."""
  content, pattern = part.get("content"), part.get("pattern")
  if part.get("type") != "Replace" or not isinstance(content, str):
    return 1.0
  text = pattern.get("String") if isinstance(pattern, dict) else None
  # A regular expression, or an empty text, may match between all characters.
  return max(1.0, len(content) / len(text)) if text else len(content) + 1.0


def find_eos_id(tokenizer: PreTrainedTokenizerBase, template: Template) -> int:
  """Returns the id of the EOS token, which ends an answer.

  Raises:
    ValueError: Answers end with a text that is no special token of the tokenizer.
  """
  end = templates.get_end_text(tokenizer, template)
  special = templates.get_special_tokens(tokenizer)
  if end not in special:
    raise ValueError(
      f"the template ends answers with {end!r}, which is no special token of the "
      f"tokenizer (its special tokens are {sorted(special)[:8]}), so sampling cannot "
      "stop: set --config.model.template to the template of the checkpoint's training"
    )
  return special[end]


def encode_conversation(
  tokenizer: PreTrainedTokenizerBase,
  template: Template,
  turns: Sequence[tuple[str, str | None]],
  *,
  video: VideoTokens = NO_VIDEO,
  system: str | None = None,
  loss: Sequence[bool] | None = None,
) -> EncodedConversation:
  """Returns the token ids of a conversation with its videos and images.

  They are at the MEDIA_MARKs of the questions, or before the first question. Texts
  before and after the features of a video are tokenized separately, as in LLaVA. The
  loss mask follows from the character offsets of tokens. A "<video>" or "</s>" in a
  question is plain text. The BOS token is added if the tokenizer adds it to plain text,
  unless a chat template writes it.

  Args:
    tokenizer: A tokenizer by load_tokenizer.
    template: Conversation template.
    turns: (question, answer) pairs. A last answer of None leaves the conversation open
      for generation.
    video: Texts and positions of the videos and images; NO_VIDEO for text only.
    system: System prompt; None for that of the template.
    loss: Whether the loss includes the answer of each turn; None for all answers.

  Raises:
    ValueError: The chat template does not render each question exactly once, or the
      questions have another number of marks than there are videos and images.
  """
  script = templates.render_conversation(
    tokenizer, template, turns, videos=_mark_features(tokenizer, video), system=system
  )
  whole = "".join(text for text, _ in script)
  # One flag per character: whether the character is part of an answer.
  turn_loss = iter([True] * len(turns) if loss is None else loss)
  learned = [(text, learn and next(turn_loss)) for text, learn in script]
  answers = [learn for text, learn in learned for _ in text]
  counts = [part for text in video.texts for part in text if isinstance(part, int)]
  if whole.count(templates.VIDEO_MARK) != len(counts):
    raise ValueError(
      "the tokenizer's chat template must render each question exactly once, "
      "because videos are in questions: set --config.model.template to another one of "
      f"{sorted(CONVERSATION_TEMPLATES)}"
    )
  has_bos = not isinstance(template, templates.ChatTemplate) and adds_bos(tokenizer)
  ids = [tokenizer.bos_token_id] * has_bos
  learn = [False] * has_bos
  at = 0
  for part, count in zip(whole.split(templates.VIDEO_MARK), [*counts, 0], strict=True):
    part_ids, offsets = _tokenize(tokenizer, part)
    ids += part_ids + [VIDEO_TOKEN] * count
    learn += [any(answers[at + a : at + b]) for a, b in offsets] + [False] * count
    at += len(part) + 1
  is_video = np.array(ids, np.int32) == VIDEO_TOKEN
  positions = make_positions(is_video, video.blocks, axes=video.axes)
  return EncodedConversation(ids, learn, positions)


def _mark_features(tokenizer, video: VideoTokens) -> list[str]:
  """Returns the text of each video, with VIDEO_MARK for each run of features."""
  mark = lambda part: (
    templates.VIDEO_MARK
    if isinstance(part, int)
    else templates.mark_special_tokens(tokenizer, part)
  )
  return ["".join(map(mark, text)) for text in video.texts]


@functools.lru_cache
def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
  """Returns whether the tokenizer puts the BOS token before a text.

  A tokenizer may define a BOS token that it never adds, as some Qwen tokenizers do. A
  tokenizer of LLaMA adds it unless its config disables it; transformers 5 forgets this
  default for a folder with only a tokenizer.model.
  """
  bos, setting = tokenizer.bos_token_id, tokenizer.init_kwargs.get("add_bos_token")
  if bos is None or setting is False:
    return False
  is_added = tokenizer("a").input_ids[:1] == [bos]
  return is_added or isinstance(tokenizer, LlamaTokenizer)


def _tokenize(tokenizer, marked):
  """Returns (ids, offsets) of a text with marks by templates.mark_special_tokens."""
  out = _rename_special_tokens(tokenizer).encode(marked, add_special_tokens=False)
  return out.ids, out.offsets


@functools.lru_cache
def _rename_special_tokens(tokenizer) -> tokenizers.Tokenizer:
  """Returns a copy of the tokenizer whose special tokens have marked names.

  No user text can contain a marked name. Other text has the same ids as before,
  including the tokenizer's rules for spaces. Two simpler ways fail: tokenizing part by
  part changes ids, and merges can produce a special token that is split.
  """
  spec = json.loads(tokenizer.backend_tokenizer.to_str())
  special = templates.get_special_tokens(tokenizer)
  name = lambda token: (
    templates.mark_special_tokens(tokenizer, token) if token in special else token
  )
  model = spec["model"]
  if isinstance(model["vocab"], dict):
    model["vocab"] = {name(token): i for token, i in model["vocab"].items()}
  else:  # In a Unigram model, the id is the index in the list.
    model["vocab"] = [(name(token), score) for token, score in model["vocab"]]
  if model.get("unk_token"):
    model["unk_token"] = name(model["unk_token"])
  if "merges" in model:
    merges = model["merges"]
    model["merges"] = [m for m in merges if special.keys().isdisjoint([*m, "".join(m)])]
  # Byte tokens, which are no real special tokens, become normal words of the model.
  spec["added_tokens"] = [
    {**token, "content": name(token["content"])}
    for token in spec["added_tokens"]
    if token["content"] in special or not token["special"]
  ]
  # A post-processor may omit spaces from the offsets of tokens, and so from the mask.
  spec["post_processor"] = spec["truncation"] = spec["padding"] = None
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def encode_suffix(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
  """Returns the ids of a text that follows an EOS token.

  The text is part of the template, so its special tokens are special.
  """
  before = templates.mark_special_tokens(tokenizer, tokenizer.eos_token)
  marked = templates.mark_special_tokens(tokenizer, templates.check_plain_text(text))
  return _tokenize(tokenizer, before + marked)[0][1:]


def encode_follow_up(
  tokenizer: PreTrainedTokenizerBase, template: Template, question: str, reply: str
) -> list[int]:
  """Returns the ids of a further question after an answer, and of a reply's start.

  Args:
    tokenizer: Tokenizer of the model.
    template: Conversation template of the model.
    question: The question.
    reply: Start of the reply, or "".
  """
  turns = [("", ""), (question, reply or None)]
  script = templates.render_conversation(tokenizer, template, turns, videos=[])
  answer = [learn for _, learn in script].index(True)
  turn = "".join(text for text, _ in script[answer + 1 :])
  turn = turn[: turn.rindex(reply) + len(reply)] if reply else turn
  end = templates.get_end_text(tokenizer, template)
  before = templates.mark_special_tokens(tokenizer, end)
  known = len(_tokenize(tokenizer, before)[0])
  return _tokenize(tokenizer, before + turn)[0][known:]


def split_response(
  encoded: EncodedConversation, at: int | None = None
) -> tuple[list[int], list[int], list[bool]]:
  """Splits a conversation into prompt ids, response ids and the response's loss mask.

  Args:
    encoded: The conversation.
    at: Index of the response's first token; None for the first token in the loss. The
      response is empty if the loss contains no token.
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
  """Pads conversations to arrays with prompt_len + response_len columns.

  Args:
    rows: The conversations.
    prompt_len: Tokens of the padded prompts.
    response_len: Tokens of the padded responses.
    pad: Token id of padding.
    starts: Indices of the responses' first tokens; None for the first token in the
      loss of each conversation.

  Raises:
    ValueError: A prompt or a response is too long; see `is_within_lengths`.
  """
  time = prompt_len + response_len
  tokens = np.full((len(rows), time), pad, np.int32)
  mask, loss_mask = np.zeros((2, len(rows), time), bool)
  axes = rows[0].positions.shape[1] if rows else 1
  positions = np.zeros((*tokens.shape, axes), np.int32)
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
    positions[i, start:stop] = row.positions
  return TokenRows(tokens, mask, loss_mask, positions)


def is_within_lengths(
  row: EncodedConversation, *, prompt_len: int, response_len: int
) -> bool:
  """Returns whether the prompt and the response of a row fit in `pad_rows`."""
  prompt, response, _ = split_response(row)
  return len(prompt) <= prompt_len and len(response) <= response_len


def round_up_length(length: int, *, multiple: int) -> int:
  """Rounds a length up to a multiple, so that fewer shapes are compiled."""
  return -(-length // multiple) * multiple


def decode_responses(
  tokenizer: PreTrainedTokenizerBase,
  tokens: Int[np.ndarray, "batch time"],
  loss_mask: Bool[np.ndarray, "batch time"],
) -> list[str]:
  """Decodes the response of each row, without special tokens."""
  special = list(templates.get_special_tokens(tokenizer).values())
  keep = loss_mask & ~np.isin(tokens, special)
  texts = tokenizer.batch_decode([row[k] for row, k in zip(tokens, keep, strict=True)])
  return [text.strip() for text in texts]
