"""The functions that stages jit, as shapes: what they are given and what they do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Frozen, Method, Packed, Params, TrainState
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.planner import abstract_run
from vlmrlaif_jax.planner.roofline import Pass
from vlmrlaif_jax.runtime import answering, video_encoding
from vlmrlaif_jax.sampling.generate import generate
from vlmrlaif_jax.training import loop


class Function(NamedTuple):
  """A function that a stage jits, and what it does."""

  name: str
  call: Callable  # Jitted; or a collect, of several that are.
  args: Callable[[], tuple[Any, ...]]  # Shapes with shardings; tracing takes a while.
  passes: dict[str, list[Pass]]  # By the name of what is jitted in it.
  runs: float  # In a step.
  roles: Params  # Weights that it reads, shapes by role.
  state: TrainState | None = None  # The shapes of what it trains.
  responses: int = 0  # Tokens that are sampled, at most.


def one_pass(run, phase, role, model, rows, time, config, *, start=0, group=1) -> Pass:
  """Of a model with logits or, with a scalar head, without.

  Args:
    start: tokens of the prompts, of which no logits are made.
    group: responses to each of the rows; if config has it so, they share the prompt.
  """
  speaks = not model.scalar_head
  if group > 1 and not config.shared_prefix:
    rows, group = rows * group, 1
  chunk = config.chunk if speaks and "chunk" in config else time
  parts = config.microbatches if phase == "train" else 1
  frames = run.config.model.frames
  return Pass(
    phase, role, model, rows, time, 0, speaks, frames, parts, chunk, start, group
  )


def packed(
  run, config: ConfigDict, examples: int, time: int, each: int = 1
) -> tuple[int, int, Packed]:
  """(rows, videos of a row, the rows) of examples that share rows of pack_len tokens.

  How many rows there are depends on the data. Here each segment is at its longest, and
  the rows are full: no data has more tokens.

  Args:
    time: of a segment, at most.
    each: segments of an example: 2 of a pair.
  """
  multiple = sharding.row_shards(run.mesh) * config.microbatches
  rows = -(-examples * each * time // config.pack_len)
  rows = tokenization.bucket(rows, multiple=multiple)
  videos = -(-examples // rows)
  shape = lambda dims, kind=jnp.int32: jax.ShapeDtypeStruct(dims, kind)
  one = abstract_run.batch(run, rows, config.pack_len)
  video = shape((rows, videos, *one.video.shape[1:]), jnp.float16)
  owners = shape((rows, videos * each))
  made = abstract_run.rowwise((video, owners), run.mesh)
  return rows, videos, Packed(*made, one.tokens, one.tokens, one.loss_mask)


def sampling(run, role, prompts, lengths, samples, slots=0) -> list[Pass]:
  """Prompts are read once, whatever is sampled for each.

  Args:
    slots: responses in the making at once; 0: all.
  """
  rows, time = prompts * samples, lengths.prompt_len + lengths.response_len
  parts = rows / slots if 0 < slots < rows else 1
  frames, new = run.config.model.frames, lengths.response_len
  read = Pass("prefill", role, run.policy, prompts, lengths.prompt_len, frames=frames)
  return [read, Pass("decode", role, run.policy, rows, time, new, parts=parts)]


def scoring(run, rows, time) -> Pass:
  """The reward model, over responses with the reward prompt after them."""
  suffix = len(tokenization.suffix_ids(run.tokenizer, run.prompts.reward))
  frames = run.config.model.frames
  time += suffix
  return Pass("forward", "reward", run.scorer, rows, time, 0, False, frames)


def update(run, config, method: Method, plan, made, data, passes) -> Function:
  tx, make = loop.starting(plan, config.optimizer)
  state = abstract_run.placed(jax.eval_shape(make, made.params), run.mesh)
  state = state._replace(params=made.params)  # What collect is given is no other.
  where = jax.tree.map(lambda x: x.sharding, state)
  return Function(
    "update",
    loop.jitted(method.loss, tx, where, config.microbatches),
    lambda: (state, Frozen(made.frozen), data()),
    {"": passes},
    runs=float(plan.epochs * plan.minibatches),
    roles={role: made.frozen[role] for role in made.params},
    state=state,
  )


def encode(run, videos: int) -> Function:
  """The vision tower; each video goes through it once, whoever asks of it."""
  rows = tokenization.bucket(32, multiple=sharding.row_shards(run.mesh))
  side, frames = run.policy.vision.image, run.config.model.frames
  pixels = jax.ShapeDtypeStruct((rows, frames, side, side, 3), jnp.uint8)
  return Function(
    "encode",
    video_encoding.encoder(run.policy, run.mesh),
    lambda: (run.base, abstract_run.rowwise(pixels, run.mesh)),
    {"": [Pass("encode", "policy", run.policy, rows, 0, frames=frames)]},
    runs=videos / rows,
    roles={"policy": {"params": {"vision": run.base["params"]["vision"]}}},
  )


def score(run, rows: int, time: int, runs: float) -> Function:
  """The reward model by itself, of texts."""
  rows = tokenization.bucket(rows, multiple=sharding.row_shards(run.mesh))
  suffix = tuple(tokenization.suffix_ids(run.tokenizer, run.prompts.reward))
  call = lambda variables, batch: rewards.scalar_scores(
    run.scorer, variables, batch, suffix
  )
  variables = abstract_run.reward_variables(run)
  return Function(
    "scores",
    jax.jit(call),
    lambda: (variables, abstract_run.batch(run, rows, time)),
    {"": [scoring(run, rows, time)]},
    runs,
    roles={"reward": variables},
  )


def judge(run, oracle: ConfigDict, asked: int) -> Function:
  """A judge of ours, asked so many times in a step."""
  return answers(
    run,
    abstract_run.policy_roles(run).frozen["ref"],
    "judge",
    oracle.prompt_len,
    oracle.max_new,
    prompts=oracle.batch,
    runs=max(asked / oracle.batch, 1.0),
    batches=1 if asked <= oracle.batch else answering.BATCHES,
  )


def answers(
  run,
  variables,
  name,
  prompt_len,
  max_new,
  *,
  prompts,
  runs,
  samples=1,
  frames=0,
  batches=answering.BATCHES,
) -> Function:
  """A model of ours that answers; see runtime/answering.py.

  Args:
    prompts: of a batch, answered at once.
    runs: batches of a step.
    batches: that are on the devices; all but one wait.
  """
  tok, rows, slots = run.tokenizer, batches * prompts, prompts * samples
  how = dict(
    max_new=max_new,
    temperature=1.0,
    eos=run.eos,
    pad=tok.pad_token_id,
    samples=samples,
    vocab=answering.plain_vocab(tok, run.eos),
    slots=slots,
  )
  call = lambda variables, batch, key, ids: generate(
    run.policy, variables, batch, key, ids=ids, **how
  )
  batch = abstract_run.batch(run, rows, prompt_len, frames)
  ids = abstract_run.scalar(run.mesh, jnp.int32).update(shape=(rows,))
  lengths = ConfigDict(dict(prompt_len=prompt_len, response_len=max_new))
  passes = sampling(run, "policy", rows, lengths, samples, slots)
  if frames:
    passes[0] = passes[0]._replace(frames=frames)
  return Function(
    name,
    jax.jit(call),
    lambda: (variables, batch, abstract_run.key(run.mesh), ids),
    {"": passes},
    runs / batches,
    roles={"policy": variables},
    responses=rows * samples * max_new,
  )
