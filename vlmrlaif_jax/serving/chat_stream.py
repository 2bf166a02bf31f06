"""Answers about a clip as they are made: streamed, and scored at their end.

They are sampled by the steps that `generate` takes, a few tokens at a time: what is
streamed is what training samples. Conversations and answers have room for the next
multiple of BUCKET tokens: a compilation for each size, and none for a request.
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
from vlmrlaif_jax.core.types import Batch, Groups, Params, flatten_groups
from vlmrlaif_jax.data import tokenization
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
from vlmrlaif_jax.serving.chat_session import ChatSession

CHAT_BUCKET = 64  # Tokens.
TOKENS_PER_UPDATE = 4  # Tokens between two looks at an answer in the making.
MAX_CHAT_TOKENS = 512  # Tokens of an answer.

Features: TypeAlias = Float[np.ndarray, "frames patches channels"]
ChatHistory: TypeAlias = Sequence[tuple[str, str]]  # Questions and answers, in turn.


class ChatQuestion(NamedTuple):
  """A question, and how to answer it."""

  question: str
  temperature: float = 0.0  # 0: the likeliest answer.
  max_tokens: int = 128
  samples: int = 1  # Answers whose best is taken.
  seed: int = 0


class ChatAnswers(NamedTuple):
  """Answers to a question, as far as they are."""

  texts: list[str]  # One for each sample.
  stopped: list[bool]  # Which have come to their end.
  done: bool = False
  scores: list[float] | None = None  # Of those that are done, if there is a judge.

  @property
  def best(self) -> int:
    """The sample with the highest score; one that was cut only if all were."""
    if self.scores is None:
      return 0
    order = list(zip(self.stopped, self.scores, strict=True))
    return max(range(len(order)), key=order.__getitem__)

  def ranked(self) -> list[tuple[bool, float, str]]:
    """(whether it is the best, score, text) of each that is scored, the best first."""
    rows = zip(self.scores or (), self.texts, strict=False)
    found = [(i == self.best, score, text) for i, (score, text) in enumerate(rows)]
    return sorted(found, key=lambda row: (not row[0], -row[1]))


def stream_side_by_side(
  chat: ChatSession,
  clip: Features,
  histories: Mapping[str, ChatHistory],
  asked: ChatQuestion,
) -> Iterator[dict[str, ChatAnswers]]:
  """What each policy has said so far; all go on in turn.

  Args:
    histories: of the conversation with each policy.
  """
  streams = [
    stream_answer(chat, name, clip, histories.get(name, ()), asked)
    for name in chat.policies
  ]
  now: dict[str, ChatAnswers] = {}
  for turn in itertools.zip_longest(*streams):
    now |= {name: said for name, said in zip(chat.policies, turn, strict=True) if said}
    yield dict(now)


def stream_answer(
  chat: ChatSession,
  name: str,
  clip: Features,
  history: ChatHistory,
  asked: ChatQuestion,
) -> Iterator[ChatAnswers]:
  """What a policy has said so far, every few tokens; the last is scored.

  Raises:
    UserError: the conversation is too long, or a setting has no meaning.
  """
  run, variables = chat.run, chat.policies[name]
  check_question(chat, asked)
  prompts = _prompts(chat, clip, history, asked.question)
  tok, start = run.tokenizer, prompts.tokens.shape[1]
  room = tokenization.round_up_length(asked.max_tokens, multiple=CHAT_BUCKET)
  # 1 stands for any temperature above 0, which is no part of what is compiled.
  shape = DecodeSettings(
    max_new=room,
    temperature=float(asked.temperature > 0),
    top_p=1.0,
    top_k=0,
    **answering.get_token_ids(run),
  )
  temperature = jnp.float32(asked.temperature)
  keys = split_row_keys(jax.random.key(asked.seed), jnp.arange(1), asked.samples)
  rows = _begin(run.policy, shape, variables, prompts, keys, temperature)
  step = 1
  while True:
    ring = rows.responses
    tokens, kept, done = jax.device_get((ring.tokens, ring.mask, rows.done))
    kept = kept & (np.arange(room) < asked.max_tokens)
    ended = done.all() or step >= asked.max_tokens
    # A character may be of several tokens.
    texts = [
      t.rstrip("\ufffd") for t in tokenization.decode_responses(tok, tokens, kept)
    ]
    said = ChatAnswers(
      texts, np.any((tokens == run.eos) & kept, axis=1).tolist(), bool(ended)
    )
    if ended:
      yield said._replace(scores=_scores(chat, prompts, tokens, kept, start))
      return
    yield said
    rows = _more(run.policy, shape, variables, rows, jnp.int32(step), temperature)
    step += TOKENS_PER_UPDATE


def check_question(chat: ChatSession, asked: ChatQuestion) -> None:
  """Refuses settings that have no meaning."""
  if not 1 <= asked.max_tokens <= MAX_CHAT_TOKENS:
    raise UserError(
      f"an answer may have from 1 to {MAX_CHAT_TOKENS} tokens, not {asked.max_tokens}"
    )
  if asked.temperature < 0 or asked.samples < 1:
    raise UserError(
      f"the temperature must be 0 or more and the answers 1 or more, not "
      f"{asked.temperature} and {asked.samples}"
    )
  if asked.samples > 1 and not asked.temperature:
    raise UserError(
      "at temperature 0 all answers are the same: raise it for the best of several"
    )
  if asked.samples > 1 and chat.judge is None:
    raise UserError(
      "the best of several answers needs a judge: a workdir whose reward model (rm) or "
      "DPO has been trained"
    )


def _prompts(
  chat: ChatSession, clip: Features, history: ChatHistory, question: str
) -> Batch:
  """A conversation as a row, with room for the next multiple of BUCKET tokens."""
  run = chat.run
  count = run.policy.count_video_tokens(len(clip))
  turns = [*history, (question, None)]
  row = answering.encode_prompt(run, turns, video_tokens=count)
  if len(row.ids) > chat.longest:
    raise UserError(
      f"the conversation has {len(row.ids)} tokens, {count} of them of the clip, more "
      f"than --max_prompt={chat.longest}: clear it, or start with a higher limit"
    )
  tokens, mask, loss_mask = tokenization.pad_rows(
    [row],
    prompt_len=tokenization.round_up_length(len(row.ids), multiple=CHAT_BUCKET),
    response_len=0,
    pad=run.tokenizer.pad_token_id,
  )
  return Batch(clip[None], tokens, mask, loss_mask)


def _scores(
  chat: ChatSession, prompts: Batch, tokens, kept, start: int
) -> list[float] | None:
  """The judge's scores of answers to a prompt."""
  if chat.judge is None:
    return None
  batch = flatten_groups(Groups(prompts, tokens[None], kept[None], kept[None]))
  return np.asarray(chat.judge.score(batch, start)).tolist()


def _sampler(
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
  """Answers with their first token."""
  return begin_rows(_sampler(model, shape, variables, temperature), prompts, keys)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _more(
  model: vlm.VLM,
  shape: DecodeSettings,
  variables: Params,
  rows: DecodeRows,
  step: Int[Array, ""],
  temperature: Float[Array, ""],
) -> DecodeRows:
  """The answers with CHUNK more tokens, or fewer if all end."""
  sampler, stop = (
    _sampler(model, shape, variables, temperature),
    step + TOKENS_PER_UPDATE,
  )
  return advance_rows(sampler, rows, step, lambda step, rows: step < stop)[1]
