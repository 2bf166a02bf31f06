"""Streams answers about a clip and scores them at their end.

`stream_side_by_side` is the main function. The decoding steps are those of `generate`,
so a streamed answer equals the one that training would sample. Lengths are rounded up
to multiples of CHAT_BUCKET tokens, so only new sizes are compiled.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import (
  VIDEO_TOKEN,
  Batch,
  Groups,
  Params,
  continue_positions,
  flatten_groups,
  is_stop,
)
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.processors.interface import lay_out
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import answering
from vlmrlaif_jax.sampling.decode_state import (
  DecodeRows,
  DecodeSettings,
  Sampler,
  advance_rows,
  begin_rows,
  make_sampler,
)
from vlmrlaif_jax.sampling.generate import split_row_keys
from vlmrlaif_jax.serving.chat_session import ChatClip, ChatSession

CHAT_BUCKET = 64  # Multiple of tokens that lengths are rounded up to.
TOKENS_PER_UPDATE = 4  # Tokens of an answer between two updates of the page.
MAX_CHAT_TOKENS = 512  # Largest number of tokens of an answer.

ChatHistory: TypeAlias = Sequence[tuple[str, str]]  # Pairs of question and answer.


class ChatQuestion(NamedTuple):
  """A question and its sampling settings."""

  question: str
  temperature: float = 0.0  # 0 selects the most likely token.
  max_tokens: int = 128
  samples: int = 1  # Number of answers; the best one is used.
  seed: int = 0


class ChatAnswers(NamedTuple):
  """The sampled answers to a question, complete or partial."""

  texts: list[str]  # One text per sample.
  stopped: list[bool]  # Whether each text ended in EOS.
  done: bool = False  # Whether generation has finished.
  scores: list[float] | None = None  # Scores of finished texts, if there is a judge.

  @property
  def best(self) -> int:
    """Index of the highest score; truncated answers come after complete ones."""
    if self.scores is None:
      return 0
    order = list(zip(self.stopped, self.scores, strict=True))
    return max(range(len(order)), key=order.__getitem__)

  def rank(self) -> list[tuple[bool, float, str]]:
    """Returns (whether it is the best, score, text) of each answer, best first."""
    pairs = zip(self.scores or (), self.texts, strict=False)
    rows = [(i == self.best, score, text) for i, (score, text) in enumerate(pairs)]
    return sorted(rows, key=lambda row: (not row[0], -row[1]))


def stream_side_by_side(
  chat: ChatSession,
  clip: ChatClip,
  histories: Mapping[str, ChatHistory],
  request: ChatQuestion,
) -> Iterator[dict[str, ChatAnswers]]:
  """Streams the answers of all policies, which advance in turn.

  Args:
    chat: Policies and judge.
    clip: The clip, or several, by chat_clip.read_clips.
    histories: Policy -> earlier turns.
    request: The question.

  Yields:
    Policy -> its answers so far.
  """
  streams = [
    stream_answer(chat, name, clip, histories.get(name, ()), request)
    for name in chat.policies
  ]
  now: dict[str, ChatAnswers] = {}
  for turn in itertools.zip_longest(*streams):
    now |= {name: part for name, part in zip(chat.policies, turn, strict=True) if part}
    yield dict(now)


def stream_answer(
  chat: ChatSession,
  name: str,
  clip: ChatClip,
  history: ChatHistory,
  request: ChatQuestion,
) -> Iterator[ChatAnswers]:
  """Streams the answers of the policy `name` every TOKENS_PER_UPDATE tokens.

  Yields:
    The answers so far. The last ones are finished and have scores.

  Raises:
    UserError: The conversation is too long, or a setting is not valid.
  """
  run, variables = chat.run, chat.policies[name]
  check_question(chat, request)
  prompts = _encode_conversation(chat, clip, history, request.question)
  tok, start = run.tokenizer, prompts.tokens.shape[1]
  max_new = tokenization.round_up_length(request.max_tokens, multiple=CHAT_BUCKET)
  ids = answering.get_token_ids(run)
  # Such a family answers like transformers, which samples any id and prints all of it.
  is_like_transformers = run.processor.layout is None
  if is_like_transformers:
    ids["vocab"] = run.policy.llm.vocab
  # The temperature is an argument of the compiled step, so 1 stands for any above 0.
  shape = DecodeSettings(
    max_new=max_new,
    temperature=float(request.temperature > 0),
    top_p=1.0,
    top_k=0,
    **ids,
  )
  temperature = jnp.float32(request.temperature)
  keys = split_row_keys(jax.random.key(request.seed), jnp.arange(1), request.samples)
  rows = _begin(run.policy, shape, variables, prompts, keys, temperature)
  step = 1
  while True:
    ring = rows.responses
    tokens, mask, done = jax.device_get((ring.tokens, ring.mask, rows.done))
    mask = mask & (np.arange(max_new) < request.max_tokens)
    ended = done.all() or step >= request.max_tokens
    texts = tokenization.decode_responses(tok, tokens, mask)
    # A character may consist of several tokens, of which the last may be missing.
    if not (ended and is_like_transformers):
      texts = [text.rstrip("\ufffd") for text in texts]
    stopped = np.any(is_stop(tokens, run.stops) & mask, axis=1)
    answers = ChatAnswers(texts, stopped.tolist(), bool(ended))
    if ended:
      yield answers._replace(scores=_score_answers(chat, prompts, tokens, mask, start))
      return
    yield answers
    rows = _advance(run.policy, shape, variables, rows, jnp.int32(step), temperature)
    step += TOKENS_PER_UPDATE


def check_question(chat: ChatSession, request: ChatQuestion) -> None:
  """Checks the settings of a question.

  Raises:
    UserError: A setting is out of range, or several samples have no judge.
  """
  if not 1 <= request.max_tokens <= MAX_CHAT_TOKENS:
    raise UserError(
      f"--max_tokens must be from 1 to {MAX_CHAT_TOKENS}, got {request.max_tokens}"
    )
  if request.temperature < 0 or request.samples < 1:
    raise UserError(
      "--temperature must be 0 or more and --best_of 1 or more, got "
      f"{request.temperature} and {request.samples}"
    )
  if request.samples > 1 and not request.temperature:
    raise UserError(
      "at temperature 0 all answers are the same. Set the temperature above 0, or "
      "request one answer."
    )
  if request.samples > 1 and chat.judge is None:
    raise UserError(
      "the best of several answers requires a judge. Give a workdir with a trained "
      "reward model (rm) or DPO, or request one answer."
    )


def _encode_conversation(
  chat: ChatSession, clip: ChatClip, history: ChatHistory, question: str
) -> Batch:
  """Encodes a conversation as a batch of one row, padded to CHAT_BUCKET tokens."""
  run = chat.run
  video = lay_out(run.processor, *clip.layouts)
  turns = [*history, (question, None)]
  row = answering.encode_prompt(run, turns, video)
  if len(row.ids) > chat.max_prompt:
    raise UserError(
      f"the conversation has {len(row.ids)} tokens, {row.ids.count(VIDEO_TOKEN)} of "
      f"them for the clip, more than --max_prompt={chat.max_prompt}. Clear it, or "
      "restart with a higher limit."
    )
  rows = tokenization.pad_rows(
    [row],
    prompt_len=tokenization.round_up_length(len(row.ids), multiple=CHAT_BUCKET),
    response_len=0,
    pad=run.tokenizer.pad_token_id,
  )
  return Batch(clip.features[None], *rows)


def _score_answers(
  chat: ChatSession, prompts: Batch, tokens, mask, start: int
) -> list[float] | None:
  """Computes the judge's scores of the answers; None without a judge."""
  if chat.judge is None:
    return None
  tokens, mask = tokens[None], mask[None]
  positions = continue_positions(prompts, mask)
  batch = flatten_groups(Groups(prompts, tokens, mask, mask, positions))
  return np.asarray(chat.judge.score(batch, start)).tolist()


def _make_sampler(
  model: vlm.VLM,
  shape: DecodeSettings,
  variables: Params,
  temperature: Float[Array, ""],
) -> Sampler:
  settings = shape._replace(temperature=temperature) if shape.temperature else shape
  return make_sampler(model, variables, settings)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
  model: vlm.VLM,
  shape: DecodeSettings,
  variables: Params,
  prompts: Batch,
  keys: Key[Array, "batch samples"],
  temperature: Float[Array, ""],
) -> DecodeRows:
  """Samples the first token of each answer."""
  return begin_rows(_make_sampler(model, shape, variables, temperature), prompts, keys)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _advance(
  model: vlm.VLM,
  shape: DecodeSettings,
  variables: Params,
  rows: DecodeRows,
  step: Int[Array, ""],
  temperature: Float[Array, ""],
) -> DecodeRows:
  """Samples TOKENS_PER_UPDATE tokens of each answer, or fewer if all end."""
  sampler = _make_sampler(model, shape, variables, temperature)
  stop = step + TOKENS_PER_UPDATE
  return advance_rows(sampler, rows, step, lambda step, rows: step < stop)[1]
