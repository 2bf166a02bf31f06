"""Workloads of stages: their jitted functions, with the shapes of the arguments.

The planner compiles these functions and counts FLOPs and bytes. The stage runs the same
functions: update and rollout of its TrainingJob, and those of answering.py, scoring.py
and video.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
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
UPDATE = "update"  # Key of the update's passes in a job's passes.


class DeviceFunction(NamedTuple):
  """A jitted function, the shapes of its arguments and its model passes."""

  name: str
  call: Callable  # A jitted function, or a `collect` that calls several of them.
  args: Callable[[], tuple[Any, ...]]  # Returns shapes with shardings; may trace.
  passes: Passes  # Model passes, by the name of the jitted function.
  runs: float  # Calls per step.
  roles: Params  # Shapes of the weights that it reads, by role.
  state: TrainState | None = None  # Shapes of the training state.
  responses: int = 0  # Maximum number of sampled tokens.
  in_flight: PyTree = ()  # Shapes of the arrays of rollouts that are sampled ahead.


class Workload(NamedTuple):
  """The functions that a stage runs on the devices, and its numbers per step."""

  functions: list[DeviceFunction]  # Functions in the order of their first call.
  steps: int  # Number of steps; 0 if it depends on the data.
  rows: int  # Examples, prompts or pairs per step.
  tokens: int  # Tokens per step of prompts and responses, trained on or sampled.
  note: str = ""  # An assumption about the data.


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

  Args:
    run: the run whose models are used.
    phase: "forward" or "train".
    role: role of the model, such as "policy" or "critic".
    rows: rows of the batch, or groups.
    time: tokens of a row.
    config: the stage's section: chunk, microbatches and shared_prefix are read.
    start: tokens of the prompt that a group shares.
    group: responses per prompt.
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
    frames=specs.get_video_length(run),
    parts=config.microbatches if phase == "train" else 1,
    chunk=config.chunk if with_logits and "chunk" in config else time,
    start=start,
    group=group,
  )


def make_sampling_passes(
  run: Run, prompts: int, sampling: SamplingSettings, *, slots: int = 0, frames: int = 0
) -> list[ModelPass]:
  """Returns the passes of `generate`: one prefill per prompt, and decoding.

  Args:
    run: the run whose policy is sampled.
    prompts: prompts on the devices.
    sampling: lengths and responses per prompt.
    slots: responses that are decoded concurrently; 0 for all.
    frames: places of a video; 0 for those of specs.get_video_length.
  """
  rows, time = prompts * sampling.samples, sampling.prompt_len + sampling.max_new
  frames = frames or specs.get_video_length(run)
  parts = rows / slots if 0 < slots < rows else 1
  role = ("policy", run.policy)
  return [
    ModelPass("prefill", *role, prompts, sampling.prompt_len, frames=frames),
    ModelPass("decode", *role, rows, time, sampling.max_new, parts=parts),
  ]


def make_reward_pass(run: Run, rows: int, time: int) -> ModelPass:
  """Returns the reward model's pass over rows that end with the reward prompt."""
  time += len(scoring.encode_reward_prompt(run))
  frames = specs.get_video_length(run)
  return ModelPass(
    "forward", "reward", run.reward_model, rows, time, logits=False, frames=frames
  )


def make_job_functions(run: Run, job: TrainingJob) -> list[DeviceFunction]:
  """Returns the rollout function of a job, if it has one, and its update."""
  tx, init = make_optimizer_and_init(job)
  state = arrays.add_shardings(jax.eval_shape(init, job.params), run.mesh)
  schedule, collect = job.schedule, job.method.collect
  args = (specs.key_spec(run.mesh), state.params, Frozen(job.frozen), job.batch_spec)
  rollout = {name: each for name, each in job.passes.items() if name != UPDATE}

  def experience() -> Any:
    if collect is offline:
      return job.batch_spec
    shapes = jax.eval_shape(lambda *each: collect(*each)[0], *args)
    part = lambda x: (x.shape[0] // schedule.minibatches, *x.shape[1:])
    cut = lambda x: jax.ShapeDtypeStruct(part(x), x.dtype)
    return specs.row_specs(jax.tree.map(cut, shapes), run.mesh)

  def list_in_flight() -> PyTree:
    # Each rollout has parameters, prompts and responses of its own.
    sampled = specs.row_specs(jax.eval_shape(collect.begin, *args), run.mesh)
    each = (state.params, job.batch_spec, sampled)
    copy = lambda: jax.tree.map(lambda x: x.update(), each)
    return [copy() for _ in range(schedule.max_staleness)]

  update = DeviceFunction(
    "update",
    jit_update(job, tx, jax.tree.map(lambda x: x.sharding, state)),
    lambda: (state, args[2], experience()),
    {"": job.passes[UPDATE]},
    runs=float(schedule.updates_per_step),
    roles={role: job.frozen[role] for role in job.params},
    state=state,
    in_flight=list_in_flight() if schedule.max_staleness else (),
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
    run: the run whose tower is used.
    videos: videos per step.
  """
  rows = video.get_encoder_batch(run.mesh)
  frames, height, width = run.processor.find_max_layout().grid
  grid, shape = (height, width), run.policy.vision.measure((height, width))
  pixels = jax.ShapeDtypeStruct((rows, frames, *shape.pixels), shape.pixel_dtype)
  encoder = video.make_encoder(run.policy, run.mesh)
  if run.processor.layout is None:  # Temporal patches of a video fill batches.
    pixels = jax.ShapeDtypeStruct((rows, *shape.pixels), shape.pixel_dtype)
    encoder = video.make_encoder(run.policy, run.mesh, grid)
    videos, frames = videos * -(-frames // rows) * rows, 1
  encode = ModelPass("encode", "policy", run.policy, rows, 0, frames=frames, grid=grid)
  return DeviceFunction(
    "encode",
    encoder,
    lambda: (run.base, specs.row_specs(pixels, run.mesh)),
    {"": [encode]},
    runs=videos / rows,
    roles={"policy": {"params": {"vision": run.base["params"]["vision"]}}},
  )


def make_score_function(run: Run, time: int, texts: float | int) -> DeviceFunction:
  """Returns the reward model's function over texts; see scoring.score_texts.

  Args:
    run: the run whose reward model is used.
    time: tokens of a prompt and a response.
    texts: texts that are scored per step.
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
  """Returns the function that answers requests; see answering.answer_requests.

  Args:
    run: the run whose policy responds.
    variables: variables of run.policy.
    name: name of the function in the plan.
    sampling: settings of sampling; its batch is decoded concurrently.
    runs: batches per step.
    frames: places of a video; 0 for those of specs.get_video_length.
    batches: batches of prompts on the devices; all but one wait.
  """
  rows, slots = batches * sampling.batch, sampling.batch * sampling.samples
  # A temperature above 0 also covers greedy decoding, which requires as much memory.
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
  """Returns the function by which the SFT policy judges.

  Args:
    run: the run whose SFT policy judges.
    oracle: a section with prompt_len, max_new and batch.
    queries: requests per step.
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
