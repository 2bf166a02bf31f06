"""Creates a run: loads its models, weights and data, and encodes its videos.

`create_run` loads everything, `load_run_without_data` only models and tokenizer.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.interrupts import NO_MONITOR, StageMonitor
from vlmrlaif_jax.core.types import Params, Stops
from vlmrlaif_jax.data import features, pipeline, records, stop_tokens, tokenization
from vlmrlaif_jax.data.processors.interface import (
  Processor,
  count_features,
  lay_out,
)
from vlmrlaif_jax.data.video import Media
from vlmrlaif_jax.huggingface import checkpoint_folders, convert
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime import scoring, video
from vlmrlaif_jax.runtime.arrays import SAVED, ArrayFactory
from vlmrlaif_jax.runtime.run import Run


def create_run(
  config: ConfigDict,
  workdir: pathlib.Path,
  note: Callable[[str], None] = distributed.print_once,
  watch: StageMonitor = NO_MONITOR,
) -> Run:
  """Loads models and data, and encodes all videos that are not encoded yet.

  Writes checkpoints.json with the layout of each checkpoint.

  Args:
    config: the run's config.
    workdir: the run's folder; created if it does not exist.
    note: receives lines of progress.
    watch: monitor that may stop the run between batches of videos.

  Raises:
    UserError: nothing is left to train on.
    ValueError: the data or a model is invalid.
  """
  layout_lines: list[str] = []  # A line for each checkpoint.

  def note_layout(line: str) -> None:
    layout_lines.append(line)
    note(line)

  has_separate_reward_model = (
    run_lib.has_separate_reward_model(config) or (workdir / "rm").exists()
  )
  mesh = sharding.make_mesh(**config.mesh)
  run, _ = load_run_without_data(
    config,
    workdir,
    note_layout,
    has_separate_reward_model=has_separate_reward_model,
    mesh=mesh,
  )
  video.check_same_tower(run)
  workdir.mkdir(parents=True, exist_ok=True)
  layouts = {"policy": layout_lines[0], "reward_model": layout_lines[-1]}
  distributed.on_process_zero(lambda: write_json(workdir / "checkpoints.json", layouts))
  splits, problems = _load_splits(config, workdir)
  run = run._replace(splits=splits, watch=watch)
  run = video.encode_videos(run, _list_videos(run), note)
  readable, unreadable = _drop_failures(run, splits)
  problems += unreadable
  if problems:
    ids = {e["id"] for part in readable for e in part}
    note(records.format_skipped_records(problems, total=len(ids) + len(problems)))
  _check_readable(config, splits, readable, unreadable)
  run = run._replace(splits=readable)
  _check_lengths(run)
  _check_preferences(run)
  return run


def load_run_without_data(
  config: ConfigDict,
  workdir: pathlib.Path,
  note: Callable[[str], None],
  *,
  has_separate_reward_model: bool,
  mesh: Mesh | None = None,
) -> tuple[Run, convert.HfConfig]:
  """Loads the models and the tokenizer of a run, without data and videos.

  Args:
    config: the run's config. Missing settings of the section `model` take defaults.
    workdir: the run's folder.
    note: receives a line for each checkpoint.
    has_separate_reward_model: whether model.reward_model_path is loaded, if it is set.
    mesh: the device mesh; None for one of all devices.

  Returns:
    The run, and the Hugging Face config of the reward model's base.
  """
  model = run_lib.default_config()
  model.update(config.model.copy_and_resolve_references())
  mesh = sharding.make_mesh() if mesh is None else mesh
  folder = run_lib.resolve_checkpoint(model.path)
  policy, base, published = load_model(model, folder, mesh, note)
  processor = convert.load_processor(folder, published, policy, config.model.frames)
  reward_model, reward_model_base = policy, base
  if has_separate_reward_model:
    other = run_lib.resolve_checkpoint(model.reward_model_path or model.path)
    if other != folder:
      reward_model, reward_model_base, published = load_model(model, other, mesh, note)
  tokenizer = tokenization.load_tokenizer(
    checkpoint_folders.find_tokenizer_folder(folder)
  )
  template = tokenization.get_template(model.template)
  run = create_run_of_models(
    config,
    workdir,
    mesh,
    (policy, base),
    (reward_model, reward_model_base),
    tokenizer,
    template,
    stop_tokens.read_stops(
      checkpoint_folders.find_generation_folder(folder), tokenizer, template
    ),
    configure_processor(processor, model),
  )
  return run, published


def create_run_of_models(
  config: ConfigDict,
  workdir: pathlib.Path,
  mesh: Mesh,
  policy: tuple[vlm.VLM, Params],
  reward_model: tuple[vlm.VLM, Params],
  tokenizer: tokenization.PreTrainedTokenizerBase,
  template: tokenization.Template,
  stops: Stops,
  processor: Processor,
  arrays: ArrayFactory = SAVED,
) -> Run:
  """Returns a run of models and their frozen variables, without data and videos."""
  return Run(
    config=config,
    workdir=workdir,
    mesh=mesh,
    policy=policy[0],
    reward_model=reward_model[0].clone(scalar_head=True),
    base=policy[1],
    reward_model_base=reward_model[1],
    tokenizer=tokenizer,
    template=template,
    stops=stops,
    splits=pipeline.Splits(),
    features=features.FeatureStore({}, {}, {}, {}, verified=set()),
    processor=processor,
    arrays=arrays,
  )


def load_model(
  model: ConfigDict,
  path: pathlib.Path,
  mesh: Mesh,
  note: Callable[[str], None],
) -> tuple[vlm.VLM, Params, convert.HfConfig]:
  """Loads a checkpoint by the settings of the section `model`.

  Returns:
    The model with LoRA, its variables, and its Hugging Face config.
  """
  loaded, variables, config = convert.load_checkpoint(
    path,
    dtype=model.dtype,
    mesh=mesh,
    tower=model.tower,
    quant=model.quant,
    train_merger=model.train_merger,
    note=note,
  )
  return configure_model(loaded, model, mesh), variables, config


def configure_model(loaded: vlm.VLM, model: ConfigDict, mesh: Mesh) -> vlm.VLM:
  """Returns a model with the LoRA, rematerialization and attention of a config."""
  llm = loaded.llm.clone(
    rank=model.lora_rank,
    alpha=model.lora_alpha,
    dropout=model.lora_dropout,
    remat=model.remat,
    attention=choose_attention(model, mesh),
    unstack=is_on_cpu(mesh),
  )
  return loaded.clone(llm=llm)


def configure_processor(processor: Processor, model: ConfigDict) -> Processor:
  """Returns a processor with the limits and the sizes of the section `model`.

  Raises:
    ValueError: a limit is out of range, or the family does not have it.
  """
  limited = processor.limit(model.fps, model.max_frames, model.max_pixels)
  return limited.fix_grids() if model.grids == "few" else limited


def is_on_cpu(mesh: Mesh) -> bool:
  """Returns whether a mesh consists of CPU devices."""
  return mesh.devices.flat[0].platform == "cpu"


def choose_attention(model: ConfigDict, mesh: Mesh) -> str:
  """Returns the attention backend of the language model for whole rows.

  "auto" is "chunked" on CPUs and "xla" elsewhere, which requires no kernel.
  """
  if model.attention != "auto":
    return model.attention
  return "chunked" if is_on_cpu(mesh) else "xla"


def _load_splits(
  config: ConfigDict, workdir: pathlib.Path
) -> tuple[pipeline.Splits, list[records.SkippedRecord]]:
  """Loads the splits. Process 0 renders the embedded world before others read it."""
  load = lambda: pipeline.load_splits(
    config.data, workdir / "world", seed=config.seed, written=workdir / "media"
  )
  if distributed.is_multiprocess():
    distributed.on_process_zero(lambda: load() and None)
  return load()


def _list_videos(run: Run) -> list[Media]:
  """Lists the videos of all splits and of all preference files in the config."""
  videos: list[Media] = [e["video"] for part in run.splits for e in part]
  sections = [each for each in run.config.values() if isinstance(each, ConfigDict)]
  for path in filter(None, (each.get("preferences") for each in sections)):
    pairs, _ = video.read_run_preferences(run, path)
    videos += [pair["video"] for pair in pairs]
  return videos


def _drop_failures(
  run: Run, splits: pipeline.Splits
) -> tuple[pipeline.Splits, list[records.SkippedRecord]]:
  """Returns the splits without examples that the model cannot read, and these examples.

  A record may be in two splits, but is reported once.
  """
  reasons: dict[records.SkippedRecord, None] = {}
  readable: list[list[records.Example]] = []
  for part in splits:
    readable.append([])
    for example in part:
      why = run.refuse_several(example["video"])
      if not why and not run.features.has(example["video"]):
        why = run.features.get_failure(example["video"])
      if why:
        reasons[records.SkippedRecord(example["id"], why)] = None
      else:
        readable[-1].append(example)
  return pipeline.Splits(*readable), list(reasons)


# Checks that something is left, before the first stage starts.


def _check_readable(
  config: ConfigDict,
  splits: pipeline.Splits,
  readable: pipeline.Splits,
  problems: Sequence[records.SkippedRecord],
) -> None:
  """Raises UserError if no video of a split that the run needs can be read."""
  needed = {"sft", "prompts", "labels"}
  if "eval" in config.stages and "held_out" in config.evaluate.names:
    needed.add("benchmark")
  for name, before, after in zip(splits._fields, splits, readable, strict=True):
    if name in needed and before and not after:
      first = problems[0]
      raise UserError(
        f"no video of the {len(before)} records of the split {name!r} can be read, for "
        f"example of {first.id}: {first.reason}. Repair the videos in "
        "data.videos, or give others"
      )


def _check_lengths(run: Run) -> None:
  """Raises UserError if all records of a file are too long."""
  data = run.config.data
  tokenize = functools.partial(
    pipeline.tokenize_examples,
    tokenizer=run.tokenizer,
    template=run.template,
    lay_out=run.lay_out_video,
    prompt_len=data.prompt_len,
  )
  splits = run.splits
  for examples, answered in (
    (splits.sft, True),
    (splits.prompts, False),
    (splits.labels, False),
  ):
    length = data.response_len if answered else 0
    reason = ""
    for example in examples:  # Almost always, the first one fits.
      fitting, _, problems = tokenize([example], response_len=length, answered=answered)
      if fitting:
        break
      reason = f"{problems[0].id} has a {problems[0].reason}"
    else:
      if examples:
        raise UserError(
          f"all {len(examples)} {'records' if answered else 'prompts'} are too long: "
          f"{reason}. Raise these settings, or give shorter records"
          f"{_advise_on_tokens(run.processor)}"
        )


def _advise_on_tokens(processor: Processor) -> str:
  """Returns how to lower the tokens of videos; "" if all have as many."""
  if processor.layout is not None:
    return ""
  tokens = count_features(lay_out(processor, processor.find_max_layout()))
  return (
    f". A video may have {tokens} tokens: lower --config.model.max_frames or "
    "--config.model.max_pixels"
  )


def _check_preferences(run: Run) -> None:
  """Raises UserError if a file of preferences has too few that can be used."""
  config = run.config
  for name, section in config.items():
    path = section.get("preferences") if isinstance(section, ConfigDict) else ""
    if not path:
      continue
    pairs, problems = video.read_run_preferences(run, path)
    pairs, unscorable = scoring.select_scorable(run, pairs)
    problems += unscorable
    needed = section.batch_size if name in config.stages else 1
    if len(pairs) < needed:
      reasons = records.format_skipped_records(
        problems, total=len(pairs) + len(problems)
      )
      raise UserError(
        f"--config.{name}.preferences={path} has {len(pairs)} usable preferences, "
        f"fewer than the {needed} that are needed. {reasons}\nGive more preferences, "
        f"or lower --config.{name}.batch_size"
      )
    if name == "rm":
      pipeline.split_for_training(pairs, section.holdout, config.seed, "rm.holdout")
