"""Makes a run: loads its models, weights and data, and encodes its videos."""

import pathlib
from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.interrupts import NO_MONITOR, StageMonitor
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import features, pipeline, records, tokenization
from vlmrlaif_jax.data.video import VideoPath
from vlmrlaif_jax.huggingface import checkpoint_layouts, convert
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime import video
from vlmrlaif_jax.runtime.arrays import SAVED, ArrayFactory
from vlmrlaif_jax.runtime.run import Run


def create_run(
  config: ConfigDict,
  workdir: pathlib.Path,
  note: Callable[[str], None] = distributed.print_once,
  watch: StageMonitor = NO_MONITOR,
) -> Run:
  """Loads models and data, and encodes all videos that are not encoded yet.

  Writes checkpoints.json: which layout each model was found in. `watch` may end the
  run between batches of videos.
  """
  read: list[str] = []  # A line for each checkpoint.

  def tell(line: str) -> None:
    read.append(line)
    note(line)

  has_separate_reward_model = (
    run_lib.has_separate_reward_model(config) or (workdir / "rm").exists()
  )
  mesh = sharding.make_mesh(**config.mesh)
  run, _ = load_run_without_data(
    config,
    workdir,
    tell,
    has_separate_reward_model=has_separate_reward_model,
    mesh=mesh,
  )
  video.check_same_tower(run)
  workdir.mkdir(parents=True, exist_ok=True)
  layouts = {"policy": read[0], "reward_model": read[-1]}
  distributed.on_process_zero(lambda: write_json(workdir / "checkpoints.json", layouts))
  splits, problems = _load_splits(config, workdir / "world")
  run = run._replace(splits=splits, watch=watch)
  run = video.encode_videos(run, _videos_of(run), note)
  splits, unreadable = _without_failures(splits, run.features)
  problems += unreadable
  if problems:
    kept = {e["id"] for part in splits for e in part}
    note(records.format_skipped_records(problems, total=len(kept) + len(problems)))
  return run._replace(splits=splits)


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
    config: a setting of the model that an older version did not have takes its default.
    workdir: the folder of the run.
    note: receives a line for each checkpoint.
    has_separate_reward_model: whether the reward_model is read from model.reward_model_path, if it is given.
    mesh: of all devices unless given.

  Returns:
    The run, and the published config of the reward_model's base.
  """
  model = run_lib.default_config()
  model.update(config.model.copy_and_resolve_references())
  mesh = sharding.make_mesh() if mesh is None else mesh
  folder = run_lib.resolve_checkpoint(model.path)
  policy, base, published = load_model(model, folder, mesh, note)
  reward_model, reward_model_base = policy, base
  if has_separate_reward_model:
    other = run_lib.resolve_checkpoint(model.reward_model_path or model.path)
    if other != folder:
      reward_model, reward_model_base, published = load_model(model, other, mesh, note)
  tokenizer = tokenization.load_tokenizer(
    checkpoint_layouts.find_tokenizer_folder(folder)
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
  arrays: ArrayFactory = SAVED,
) -> Run:
  """Returns a run of models with their weights, without data and videos.

  Raises:
    ValueError: the tokenizer has no token that ends an answer.
  """
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
    eos=tokenization.find_eos_id(tokenizer, template),
    splits=pipeline.Splits(),
    features=features.FeatureStore({}, {}, {}),
    arrays=arrays,
  )


def load_model(
  model: ConfigDict,
  path: pathlib.Path,
  mesh: Mesh,
  note: Callable[[str], None],
) -> tuple[vlm.VLM, Params, convert.HfConfig]:
  """What convert.load_llava returns, by the section "model" of a config."""
  made, variables, config = convert.load_llava(
    path,
    dtype=model.dtype,
    mesh=mesh,
    tower=model.tower,
    quant=model.quant,
    note=note,
  )
  return configure_model(made, model, mesh), variables, config


def configure_model(made: vlm.VLM, model: ConfigDict, mesh: Mesh) -> vlm.VLM:
  """Returns a model with LoRA and all that a config, and no checkpoint, says of it."""
  llm = made.llm.clone(
    rank=model.lora_rank,
    alpha=model.lora_alpha,
    remat=model.remat,
    attention=choose_attention(model, mesh),
    unstack=is_on_cpu(mesh),
  )
  return made.clone(llm=llm)


def is_on_cpu(mesh: Mesh) -> bool:
  return mesh.devices.flat[0].platform == "cpu"


def choose_attention(model: ConfigDict, mesh: Mesh) -> str:
  """The language model's attention of whole rows; "auto" is what suits the devices:
  "chunked" on CPUs, and elsewhere "xla", which needs no kernel.
  """
  if model.attention != "auto":
    return model.attention
  return "chunked" if is_on_cpu(mesh) else "xla"


def _load_splits(
  config: ConfigDict, folder: pathlib.Path
) -> tuple[pipeline.Splits, list[records.SkippedRecord]]:
  """The splits; the embedded world is rendered by process 0 before others read it."""
  load = lambda: pipeline.load_splits(config.data, folder, seed=config.seed)
  if distributed.is_multiprocess():
    distributed.on_process_zero(lambda: load() and None)
  return load()


def _videos_of(run: Run) -> list[VideoPath]:
  """Every video of every split, and of the preferences that are given."""
  videos: list[VideoPath] = [e["video"] for part in run.splits for e in part]
  sections = [each for each in run.config.values() if isinstance(each, ConfigDict)]
  for path in filter(None, (each.get("preferences") for each in sections)):
    given, _ = records.read_preferences(path, videos=video.get_videos_folder(run))
    videos += [pair["video"] for pair in given]
  return videos


def _without_failures(
  splits: pipeline.Splits, store: features.FeatureStore
) -> tuple[pipeline.Splits, list[records.SkippedRecord]]:
  """Returns the splits without the examples whose video cannot be read, and those once.

  A record may be in two splits: the prompts are often those of SFT.
  """
  readable = [[e for e in part if store.has(e["video"])] for part in splits]
  problems = [
    records.SkippedRecord(
      e["id"], store.failures[features.format_video_name(e["video"])]
    )
    for part in splits
    for e in part
    if not store.has(e["video"])
  ]
  return pipeline.Splits(*readable), list(dict.fromkeys(problems))
