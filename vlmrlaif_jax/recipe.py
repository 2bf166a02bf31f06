"""Runs a recipe: its stages in order; skips what is done, resumes the rest."""

import functools
import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vlmrlaif_jax import (
  abilities,
  alarms,
  benchmarks,
  build,
  checkpoint,
  divide,
  dpo,
  evaluate,
  hosts,
  judges,
  label,
  measure_judges,
  plan_memory,
  report,
  rl,
  roles,
  scoring,
  sharding,
  train,
)
from vlmrlaif_jax.log import Log, replace_text
from vlmrlaif_jax.rounds import split_round
from vlmrlaif_jax.watch import Trace, Watch


class RecipeError(Exception):
  """A recipe that cannot be run as it is given, and what to do about it."""


class Stage(NamedTuple):
  """How a stage is run, and what of the config it depends on."""

  section: str  # Of the config.
  run: Callable[[build.Run, str, pathlib.Path, Log], dict[str, Any]]
  steps: Callable[[build.Run], int]  # For the progress line.


def _label(run, stage, folder, log):
  return label.run_stage(run, roles.policies(run)["sft"], folder, log)


def _evaluate(run, stage, folder, log):
  policies = roles.policies(run)
  reward = None
  if roles.has_reward_model(run):
    reward = functools.partial(scoring.score_texts, run, roles.reward_variables(run))
  return evaluate.run_stage(run, policies, reward, folder, log)


STAGES = {
  "sft_short": Stage("sft", train.sft, lambda run: run.config.sft.short_steps),
  "sft_long": Stage("sft", train.sft, lambda run: run.config.sft.long_steps),
  "label": Stage("label", _label, label.total_steps),
  "rm": Stage("rm", train.rm, lambda run: run.config.rm.steps),
  "ppo": Stage("ppo", rl.ppo, lambda run: run.config.ppo.steps),
  "claims": Stage("claims", divide.run_stage, divide.total_steps),
  "dpo": Stage("dpo", dpo.run_stage, lambda run: run.config.dpo.steps),
  "grpo": Stage("grpo", rl.grpo, lambda run: run.config.grpo.steps),
  "grm_sft": Stage("grm_sft", judges.grm_sft, lambda run: run.config.grm_sft.steps),
  "grm": Stage("grm", judges.grm, lambda run: run.config.grm.steps),
  "judges": Stage("judges", measure_judges.run_stage, measure_judges.total_steps),
  "eval": Stage("evaluate", _evaluate, evaluate.total_steps),
  "abilities": Stage("label", abilities.run_stage, abilities.total_steps),
  "benchmarks": Stage("benchmarks", benchmarks.run_stage, benchmarks.total_steps),
}
ROUND = "round"  # In a recipe's stages: "claims_N" and "dpo_N" for each of its rounds.
ROLLOUTS = (*roles.RL, "grm")  # Sections of stages that sample what they learn from.
TRAINED = ("sft", "rm", "dpo", "grm_sft", *ROLLOUTS)  # Sections of stages that train.
# These may differ between runs of one workdir: no result depends on them.
FREE = (
  "mesh",
  "recipe",
  "stages",
  "preset",
  "rounds",
  "benchmarks.names",  # Each is for itself.
  "rm.measure_every",
  *(f"{name}.alarms" for name in TRAINED),
  "model.size",
  "model.scorer_size",
  "data.workers",
  "data.timeout_s",
  "data.features",
  "data.features_limit_gb",
  "data.features_memory_gb",
)


def stage_of(name: str) -> Stage:
  """The entry of a stage, which may be of a round: "dpo_2" is a "dpo"."""
  return STAGES[split_round(name)[0]]


def stages_of(config: ConfigDict) -> list[str]:
  """The stages of a recipe by name, its rounds written out.

  Raises:
    RecipeError: a stage that there is not.
  """
  of_rounds = [
    f"{name}_{number}"
    for number in range(1, config.rounds + 1)
    for name in ("claims", "dpo")
  ]
  named = []
  for stage in config.stages:
    if stage not in (*STAGES, ROUND):
      known = (*STAGES, ROUND)
      raise RecipeError(f"stages must be of {known}, not {stage!r}")
    named += of_rounds if stage == ROUND else [stage]
  return named


def run(
  config: ConfigDict,
  workdir: str,
  stop: Callable[[], bool] = lambda: False,
  traced: range = range(0),
) -> pathlib.Path:
  """Runs what is not done yet, writes the report, and returns its path.

  Args:
    stop: whether to end now; asked between steps.
    traced: steps of each stage that a trace is written of.

  Raises:
    Stopped: it was to end; what is done is kept.
  """
  root = pathlib.Path(workdir).absolute()
  hosts.check_same("the config", config.to_json_best_effort())
  if hosts.several():
    kind = jax.devices()[0].device_kind
    hosts.tell(
      f"{jax.process_count()} processes with {jax.device_count()} devices ({kind}), "
      f"{jax.local_device_count()} of them here"
    )
  stages = stages_of(config)
  check_paths(config)
  check_benchmarks(config)
  check_batches(config)
  check_mesh(config)
  check_schedules(config)
  check_alarms(config)
  hosts.once(lambda: check_workdir(config, root))
  # What was compiled for one run serves all that stand beside it.
  jax.config.update("jax_compilation_cache_dir", str(root.parent / ".jax_cache"))
  todo = hosts.once(lambda: [s for s in stages if not _done(root, s).exists()])
  for stage in stages:
    if stage not in todo:
      hosts.tell(f"{stage}: done before, skipped")
  if todo:
    try:
      plan_memory.refuse(config, todo)
      made = build.make(config, root, watch=Watch(stop))
    # Of the data or the model that the config names, or of the devices there are.
    except (ValueError, plan_memory.TooLarge) as error:
      raise RecipeError(str(error)) from error
    with jax.set_mesh(made.mesh):  # Kernels find it: attention._splash, quant._pallas.
      for stage in todo:
        _run_stage(made, stage, root / stage, stop, traced)
  path = pathlib.Path(hosts.once(lambda: str(report.write_report(root))))
  hosts.tell(f"report: {path}")
  return path


def _run_stage(
  made: build.Run,
  stage: str,
  folder: pathlib.Path,
  stop: Callable[[], bool],
  traced: range,
) -> None:
  start = time.monotonic()
  entry = stage_of(stage)
  resumed = checkpoint.latest_step(str(folder / "checkpoints"))
  steps, writes = entry.steps(made), hosts.is_first()
  with (
    Log(folder, stage, steps, resume_from=resumed, writes=writes) as log,
    Trace(traced, str(folder / "trace"), log.note) as trace,
  ):
    watch = Watch(stop, trace.step)
    watch.check(f"the run stands before {stage}")
    summary = entry.run(made._replace(watch=watch), stage, folder, log)
    seconds = time.monotonic() - start
    log.note(f"{stage}: done in {seconds:.0f} s")
  done = {"seconds": round(seconds, 1), "summary": summary}
  told = json.dumps(done, indent=2)
  hosts.once(lambda: replace_text(_done(made.workdir, stage), told))


def _done(root: pathlib.Path, stage: str) -> pathlib.Path:
  return root / stage / "done.json"


# Checks before anything is computed.


def check_paths(config: ConfigDict) -> None:
  """Refuses a config that names files that are not there, all of them at once."""
  wanted = [
    (
      "model.path",
      "a LLaVA checkpoint in Hugging Face's form: config.json, "
      "*.safetensors and the tokenizer's files",
    ),
    ("model.scorer_path", "the same, for reward model and critic"),
    ("data.records", "a LLaVA-style .json or .jsonl file to fine-tune on"),
    ("data.videos", "the folder that the videos in the records are named from"),
    ("data.prompts", "a file of the same form with the questions for RL"),
    ("data.benchmark", "a file of the same form to measure on"),
    ("rm.preferences", "a file of preferences, see docs/data.md"),
    ("dpo.preferences", "a file of preferences, see docs/data.md"),
  ]
  missing = []
  for key, what in wanted:
    section, name = key.split(".")
    path = config[section][name]
    if path and not path.startswith(build.BUILTIN) and not pathlib.Path(path).exists():
      missing.append(f"  --config.{key}={path}\n      put there {what}")
  if missing:
    raise RecipeError(
      "these paths are missing:\n"
      + "\n".join(missing)
      + "\nPut the files there, or give the paths that you have by these flags."
    )


def check_benchmarks(config: ConfigDict) -> None:
  """Refuses benchmarks whose files are not there, or not of their layout."""
  if "benchmarks" in _sections(config):
    try:
      benchmarks.check(config)
    except ValueError as error:
      raise RecipeError(str(error)) from error


def check_batches(config: ConfigDict) -> None:
  """Refuses batches of the recipe that their parts or the mesh cannot divide."""
  try:
    shards = build.row_shards(sharding.make_mesh(**config.mesh))
  except ValueError as error:
    raise RecipeError(f"{error}; see --config.mesh") from error
  sizes = {
    "sft.batch_size": (config.sft.batch_size, config.sft.microbatches),
    "rm.batch_size": (config.rm.batch_size, config.rm.microbatches),
    "grm_sft.batch_size": (config.grm_sft.batch_size, config.grm_sft.microbatches),
    "dpo.batch_size": (config.dpo.batch_size, config.dpo.microbatches),
    "claims.batch": (config.claims.batch, 1),
    **{
      f"{name}.batch_size": (
        # A row of PPO is a response, one of GRPO all that were sampled for a prompt.
        config[name].batch_size * (config[name].samples if name == "ppo" else 1),
        config[name].minibatches * config[name].microbatches,
      )
      for name in ROLLOUTS
    },
    "label.batch": (config.label.batch, 1),
    "evaluate.batch": (config.evaluate.batch, 1),
    "judges.batch": (config.judges.batch, 1),
    "benchmarks.batch": (config.benchmarks.batch, 1),
  }
  used = _sections(config)
  wrong = [
    f"  --config.{key}: {rows} rows in {parts} parts over {shards} devices of the mesh "
    f"(data x fsdp); {rows} must be a multiple of {parts * shards}"
    for key, (rows, parts) in sizes.items()
    if key.split(".")[0] in used and rows % (parts * shards)
  ]
  # Prompts are spread over the mesh before there are `samples` rows of each.
  if "ppo" in used and config.ppo.batch_size % shards:
    wrong.append(
      f"  --config.ppo.batch_size: {config.ppo.batch_size} prompts over {shards} "
      "devices of the mesh (data x fsdp)"
    )
  if wrong:
    raise RecipeError(
      "batches that do not divide:\n"
      + "\n".join(wrong)
      + "\nChange the size, or give more of the devices to --config.mesh.tensor."
    )
  if config.rm.microbatches > 1 and config.rm.centre_coef:
    raise RecipeError(
      f"rm.centre_coef={config.rm.centre_coef} speaks of the mean of a "
      f"whole batch, which {config.rm.microbatches} microbatches do not have: set one "
      "of --config.rm.centre_coef=0 and --config.rm.microbatches=1"
    )


def check_mesh(config: ConfigDict) -> None:
  """Refuses what the mesh's context and tensor cannot divide.

  Prompts that are only read, and the reward prompt behind an answer, may have any
  length: models pad them. Of what is trained on, log-probabilities are made as well.
  """
  shape = sharding.make_mesh(**config.mesh).shape
  _check_heads(config.model, shape["tensor"])
  context = shape["context"]
  if context > 1 and config.model.attention == "cudnn":
    raise RecipeError(
      f"model.attention=cudnn does not work on parts of rows, of mesh.context={context}"
      ": set --config.model.attention=xla, or --config.mesh.context=1"
    )
  policies, raters = ("sft", "ppo", "grpo", "dpo"), ("grm_sft", "grm")
  used = _sections(config)
  lengths = {f"{name}.chunk": config[name].chunk for name in (*policies, *raters)}
  for name in policies:
    whole = config.data.prompt_len + config.data.response_len
    lengths[f"{name}: data.prompt_len + data.response_len"] = whole
  for name in raters:
    whole = config[name].prompt_len + config[name].max_new
    lengths[f"{name}.prompt_len + {name}.max_new"] = whole
  wrong = [
    f"  {what} is {length}, to be {-(-length // context) * context}"
    for what, length in lengths.items()
    if re.match(r"\w+", what)[0] in used and length % context
  ]
  if wrong:
    raise RecipeError(
      f"tokens that mesh.context={context} devices do not divide:\n"
      + "\n".join(wrong)
      + "\nRaise these lengths, or set --config.mesh.context=1."
    )


def _check_heads(model: ConfigDict, tensor: int) -> None:
  """Refuses a kernel that cannot have heads of its own on each device."""
  if model.attention != "splash":
    return
  for path in {model.path, model.scorer_path} - {""}:
    file = build.resolve(path) / "config.json"
    if not file.exists():  # An adapter has its base's.
      continue
    told = json.loads(file.read_text())
    told = told.get("text_config", told)
    # Some leave them to be known; those are found when it is read.
    heads = told.get("num_key_value_heads", told.get("num_attention_heads", 0))
    if heads % tensor:
      raise RecipeError(
        f"{path} has {heads} key and value heads, which mesh.tensor={tensor} does not "
        "divide, as splash wants: give another --config.mesh.tensor, or "
        "--config.model.attention=xla"
      )


def check_schedules(config: ConfigDict) -> None:
  """Refuses a warm-up that lasts as long as the training it is of."""
  rollouts = lambda part: part.steps * part.epochs * part.minibatches
  updates = {
    "sft": min(config.sft.short_steps, config.sft.long_steps),
    "rm": config.rm.steps,
    "dpo": config.dpo.steps,
    "grm_sft": config.grm_sft.steps,
    **{name: rollouts(config[name]) for name in ROLLOUTS},
  }
  wrong = [
    f"  --config.{section}.optimizer.warmup_steps="
    f"{config[section].optimizer.warmup_steps}, of {count} updates"
    for section, count in updates.items()
    if section in _sections(config) and config[section].optimizer.warmup_steps >= count
  ]
  if wrong:
    raise RecipeError(
      "warm-ups that never end:\n"
      + "\n".join(wrong)
      + "\nLower them, or take more steps."
    )


def check_alarms(config: ConfigDict) -> None:
  """Refuses alarms that there are not."""
  for section in sorted(_sections(config) & set(TRAINED)):
    try:
      alarms.check(config[section].alarms)
    except ValueError as error:
      raise RecipeError(f"--config.{section}.{error}") from error


def _sections(config: ConfigDict) -> set[str]:
  """The sections of the config that its stages read."""
  return {stage_of(stage).section for stage in stages_of(config)}


def check_workdir(config: ConfigDict, root: pathlib.Path) -> None:
  """Refuses a workdir whose finished or begun stages ran under another config.

  Settings of stages that have not begun may still change, and so may the mesh.
  """
  path = root / "config.json"
  now = json.loads(config.to_json_best_effort()) | {"stages": stages_of(config)}
  if path.exists():
    known = [s for s in (*STAGES, *stages_of(config)) if (root / s).exists()]
    begun = {stage_of(stage).section for stage in known}
    fixed = begun | {"seed", "model", "data"} if begun else set()
    if (root / "world").exists():  # It is rendered once.
      fixed |= {"seed", "data"}
    before = json.loads(path.read_text())
    changed = [
      f"  {key}: {old!r} there, {new!r} now"
      for key, old, new in _differences(before, now)
      if key.split(".")[0] in fixed
    ]
    if changed:
      raise RecipeError(
        f"{root} holds a run under another config:\n"
        + "\n".join(changed)
        + "\nGive another --workdir, or the old values; or remove the folders of the "
        "stages that are to be run again."
      )
  root.mkdir(parents=True, exist_ok=True)
  replace_text(path, json.dumps(now, indent=2))


def _differences(old: Any, new: Any, at: str = ""):
  """(key, old, new) of every leaf that differs."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(old.keys() | new.keys()):
      where = f"{at}.{key}" if at else key
      if where not in FREE:
        yield from _differences(old.get(key), new.get(key), where)
  elif old != new:
    yield at, old, new
