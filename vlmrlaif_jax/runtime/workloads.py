"""What a stage runs on the devices: its jitted functions with the shapes they take.

The planner compiles these functions and counts what they compute. They are those that
the stage runs: the update and the rollout of its TrainingJob, and the functions of
answering.py, scoring.py and video.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Frozen, ModelPass, Params, TrainState, offline
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.runtime import answering, arrays, role_params, scoring, specs, video
from vlmrlaif_jax.runtime.answering import SamplingSettings
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.sampling.generate import generate
from vlmrlaif_jax.training.job import TrainingJob, jit_update, make_optimizer_and_init

Passes = dict[str, list[ModelPass]]
UPDATE = "update"  # The name of a job's passes that the update makes.


class DeviceFunction(NamedTuple):
  """A jitted function, the shapes it takes and the model passes it makes."""

  name: str
  call: Callable  # Jitted, or a `collect` that calls several jitted functions.
  args: Callable[[], tuple[Any, ...]]  # Returns shapes with shardings; may trace.
  passes: Passes  # By the name of the jitted function.
  runs: float  # Calls in a step.
  roles: Params  # Shapes of the weights that it reads, by role.
  state: TrainState | None = None  # Shapes of what it trains.
  responses: int = 0  # Greatest number of tokens that it samples.


class Workload(NamedTuple):
  """All that a stage runs on the devices."""

  functions: list[DeviceFunction]  # In the order they first run.
  steps: int  # 0 if the number depends on the data.
  rows: int  # Examples, prompts or pairs of a step.
  # Tokens of a step that are learned from or sampled, each response with its prompt.
  tokens: int
  note: str = ""  # An assumption about the data.


# Model passes.


def make_model_pass(
  run: Run,
  phase: str,
  role: str,
  rows: int,
  time: int,
  config: ConfigDict,
  *,
  start: int = 0,
  group: int = 1,
) -> ModelPass:
  """Returns a pass over whole rows, with logits unless the model has a scalar head.

  Args: see ModelPass. The phase is "forward" or "train"; of the stage's `config`,
    `chunk`, `microbatches` and `shared_prefix` are read.
  """
  model = run.reward_model if role in ("reward", "critic") else run.policy
  with_logits = not model.scalar_head
  if group > 1 and not config.shared_prefix:
    rows, group = rows * group, 1
  return ModelPass(
    phase,
    role,
    model,
    rows,
    time,
    logits=with_logits,
    frames=run.config.model.frames,
    parts=config.microbatches if phase == "train" else 1,
    chunk=config.chunk if with_logits and "chunk" in config else time,
    start=start,
    group=group,
  )


def make_sampling_passes(
  run: Run, prompts: int, sampling: SamplingSettings, *, slots: int = 0, frames: int = 0
) -> list[ModelPass]:
  """Returns the passes of `generate`: each prompt is read once for all its samples.

  Args:
    prompts: prompts on the devices.
    slots: responses that are decoded concurrently; 0 for all.
    frames: frames of each video; 0 for config.model.frames.
  """
  rows, time = prompts * sampling.samples, sampling.prompt_len + sampling.max_new
  frames = frames or run.config.model.frames
  parts = rows / slots if 0 < slots < rows else 1
  of = ("policy", run.policy)
  return [
    ModelPass("prefill", *of, prompts, sampling.prompt_len, frames=frames),
    ModelPass("decode", *of, rows, time, sampling.max_new, parts=parts),
  ]


def make_reward_pass(run: Run, rows: int, time: int) -> ModelPass:
  """Returns the reward model's pass over rows, each with the reward prompt after it."""
  time += len(scoring.encode_reward_prompt(run))
  frames = run.config.model.frames
  return ModelPass(
    "forward", "reward", run.reward_model, rows, time, logits=False, frames=frames
  )


# Functions.


def make_job_functions(run: Run, job: TrainingJob) -> list[DeviceFunction]:
  """Returns the rollout of a job, if it has one, and its update."""
  tx, init = make_optimizer_and_init(job)
  state = arrays.add_shardings(jax.eval_shape(init, job.params), run.mesh)
  schedule, collect = job.schedule, job.method.collect
  args = (specs.key_spec(run.mesh), state.params, Frozen(job.frozen), job.batch_spec)
  rollout = {name: each for name, each in job.passes.items() if name != UPDATE}

  def experience() -> Any:
    if collect is offline:
      return job.batch_spec
    shapes = jax.eval_shape(lambda *given: collect(*given)[0], *args)
    part = lambda x: (x.shape[0] // schedule.minibatches, *x.shape[1:])
    cut = lambda x: jax.ShapeDtypeStruct(part(x), x.dtype)
    return specs.row_specs(jax.tree.map(cut, shapes), run.mesh)

  update = DeviceFunction(
    "update",
    jit_update(job, tx, jax.tree.map(lambda x: x.sharding, state)),
    lambda: (state, args[2], experience()),
    {"": job.passes[UPDATE]},
    runs=float(schedule.updates_per_step),
    roles={role: job.frozen[role] for role in job.params},
    state=state,
  )
  if collect is offline:
    return [update]
  sampled = [p for each in rollout.values() for p in each if p.phase == "decode"]
  return [
    DeviceFunction(
      "collect",
      collect,
      lambda: args,
      rollout,
      runs=1.0,
      roles={**job.frozen, "trained": state.params},
      responses=sum(p.rows * p.new for p in sampled),
    ),
    update,
  ]


def make_encode_function(run: Run, videos: int) -> DeviceFunction:
  """Returns the vision tower's function, which encodes each video once.

  Args:
    videos: videos of a step.
  """
  rows = video.get_encoder_batch(run.mesh)
  side, frames = run.policy.vision.image, run.config.model.frames
  pixels = jax.ShapeDtypeStruct((rows, frames, side, side, 3), jnp.uint8)
  return DeviceFunction(
    "encode",
    video.make_encoder(run.policy, run.mesh),
    lambda: (run.base, specs.row_specs(pixels, run.mesh)),
    {"": [ModelPass("encode", "policy", run.policy, rows, 0, frames=frames)]},
    runs=videos / rows,
    roles={"policy": {"params": {"vision": run.base["params"]["vision"]}}},
  )


def make_score_function(run: Run, time: int, texts: float | int) -> DeviceFunction:
  """Returns the reward model's function over texts; see scoring.score_texts.

  Args:
    time: tokens of a prompt and a response.
    texts: texts that are scored in a step.
  """
  runs = texts / scoring.SCORING_BATCH
  rows = tokenization.round_up_length(
    scoring.SCORING_BATCH, multiple=sharding.num_batch_shards(run.mesh)
  )
  suffix = scoring.encode_reward_prompt(run)
  call = lambda variables, batch: rewards.compute_scalar_scores(
    run.reward_model, variables, batch, suffix
  )
  variables = role_params.load_reward_model(run)
  return DeviceFunction(
    "scores",
    jax.jit(call),
    lambda: (variables, specs.batch_specs(run, rows, time)),
    {"": [make_reward_pass(run, rows, time)]},
    runs,
    roles={"reward": variables},
  )


def make_answer_function(
  run: Run,
  variables: Params,
  name: str,
  sampling: SamplingSettings,
  *,
  runs: float,
  frames: int = 0,
  batches: int = answering.BATCHES,
) -> DeviceFunction:
  """Returns the function that answers requests; see answering.answer.

  Args:
    variables: of run.policy.
    name: of the function in the plan.
    sampling: its `batch` requests are answered concurrently.
    runs: batches of a step.
    frames: frames of each video; 0 for config.model.frames.
    batches: batches of prompts on the devices; all but one wait.
  """
  rows, slots = batches * sampling.batch, sampling.batch * sampling.samples
  # Whatever the temperature: greedy decoding computes less, but holds no less.
  settings = answering.make_generate_settings(run, sampling._replace(temperature=1.0))
  call = lambda variables, batch, key, ids: generate(
    run.policy, variables, batch, key, ids=ids, **settings
  )
  batch = specs.batch_specs(run, rows, sampling.prompt_len, frames)
  ids = specs.scalar_spec(run.mesh, jnp.int32).update(shape=(rows,))
  return DeviceFunction(
    name,
    jax.jit(call),
    lambda: (variables, batch, specs.key_spec(run.mesh), ids),
    {"": make_sampling_passes(run, rows, sampling, slots=slots, frames=frames)},
    runs / batches,
    roles={"policy": variables},
    responses=rows * sampling.samples * sampling.max_new,
  )


def make_judge_function(run: Run, oracle: ConfigDict, queries: int) -> DeviceFunction:
  """Returns the function by which a model of the run judges.

  Args:
    oracle: settings prompt_len, max_new and batch.
    queries: queries of a step.
  """
  batch = oracle.batch
  return make_answer_function(
    run,
    role_params.make_policy_roles(run, role_params.SFT_STAGES[1])[1]["ref"],
    "judge",
    SamplingSettings(oracle.prompt_len, oracle.max_new, batch),
    runs=max(queries / batch, 1.0),
    batches=1 if queries <= batch else answering.BATCHES,
  )
