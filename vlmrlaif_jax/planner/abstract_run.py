"""Creates a run without weights: shapes with shardings take the place of arrays.

Stages build the same jobs from it as from a real run, because `Run.arrays` returns
shapes.
"""

import functools
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import LlavaConfig

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import stop_tokens, tokenization
from vlmrlaif_jax.huggingface import checkpoint_layouts, convert, families
from vlmrlaif_jax.models import clip, projector, vlm
from vlmrlaif_jax.runtime import loading, video
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.arrays import ArrayFactory, add_shardings
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.stage import get_stage


def create_abstract_run(config: ConfigDict, mesh: Mesh) -> Run:
  """Creates a run like loading.create_run, with shapes and without data.

  Raises:
    UserError: A checkpoint is missing and its size is not known.
  """
  model = config.model
  published, other = find_configs(config)
  policy = scorer = _make_model(model, published, mesh)
  if other is not published:
    scorer = _make_model(model, other, mesh)
  tokenizer, template, stops = _load_tokenizer(model.path, model.template)
  folder = pathlib.Path(model.path)
  if model.path.startswith(run_lib.BUILTIN):
    folder = run_lib.resolve_checkpoint(model.path)
  run = loading.create_run_of_models(
    config,
    pathlib.Path(),
    mesh,
    policy,
    scorer,
    tokenizer,
    template,
    stops,
    loading.configure_processor(
      convert.load_processor(folder, published, policy[0], model.frames), model
    ),
    ABSTRACT_ARRAYS,
  )
  length = video.get_max_length(run.processor, config.data.prompt_len)
  return run._replace(features=run.features._replace(length=length))


def find_configs(config: ConfigDict) -> tuple[convert.HfConfig, convert.HfConfig]:
  """Returns the configs of the checkpoints of the policy and of the reward model.

  Raises:
    FileNotFoundError: A language model has no vision tower.
    UserError: A checkpoint is missing and its size is not known.
    ValueError: A checkpoint is not supported.
  """
  model = config.model
  policy = _find_config(model.path, model.tower, model.size)
  if not run_lib.has_separate_reward_model(config):
    return policy, policy
  size = model.reward_model_size or model.size
  return policy, _find_config(model.reward_model_path, model.tower, size)


class PlannedStage(NamedTuple):
  """A stage's name and its work on the devices."""

  name: str
  workload: Workload


def plan_recipe_stages(run: Run, names: Iterable[str]) -> Iterator[PlannedStage]:
  """Yields the stages that run a function on the devices.

  Args:
    run: A run of shapes.
    names: Names of stages, such as "dpo_2".
  """
  for name in names:
    if (workload := get_stage(name).workload) is not None:
      yield PlannedStage(name, workload(run, name))


# Returns shapes in place of arrays, as if every earlier stage had run.
ABSTRACT_ARRAYS = ArrayFactory(
  restore=lambda folder, like: like,
  has=lambda folder: True,
  initialize=lambda shapes, key: shapes,
  # Updated shapes are new objects, so they do not count as the same arrays.
  map_leaves=lambda fn, tree: jax.tree.map(lambda x: x.update(), tree),
)


def _make_model(
  model: ConfigDict, published: convert.HfConfig, mesh: Mesh
) -> tuple[vlm.VLM, Params]:
  """Returns what loading.load_model returns, with shapes."""
  plain = convert.make_model(published, model.dtype, train_merger=model.train_merger)
  shapes = convert.get_stored_shapes(vlm.get_param_shapes(plain), model.quant)
  return loading.configure_model(plain, model, mesh), add_shardings(shapes, mesh)


def _find_config(path: str, tower: str, size: str) -> convert.HfConfig:
  """Returns a checkpoint's config, for which config.json is enough, or a known one."""
  try:
    folder = run_lib.resolve_checkpoint(path)
  except UserError as error:
    if size in run_lib.PLANNED_SIZES:
      return _make_known_config(size)
    if size in run_lib.PLANNED_FAMILIES:
      return families.make_published_config(*run_lib.PLANNED_FAMILIES[size])
    sizes = ", ".join((*run_lib.PLANNED_SIZES, *run_lib.PLANNED_FAMILIES))
    raise UserError(
      f"{error}; or, to plan without a checkpoint, set --config.model.size (and "
      f"--config.model.reward_model_size) to one of {sizes}; got {size!r}"
    ) from error
  if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
    return checkpoint_layouts.read_checkpoint_config(folder)
  return checkpoint_layouts.find_layout(folder, tower=tower).config


@functools.lru_cache
def _make_known_config(size: str) -> convert.HfConfig:
  family, shape, tower = run_lib.PLANNED_SIZES[size]
  llm = family.Model(**shape)
  vision = clip.VisionTower(**clip.VARIANTS[tower])
  model = vlm.VLM(vision, projector.Projector(llm.embed), llm)
  config = convert.make_llava_config(model, image_token=llm.vocab)
  return LlavaConfig.from_dict(config).to_dict() | {"projector_depth": 2}


@functools.lru_cache
def _load_tokenizer(path: str, template: str):
  """Returns a checkpoint's tokenizer, template and EOS ids, or the built-in ones.

  A plan depends only on a few ids and on the length of a prompt.
  """
  checkpoint = pathlib.Path(path)
  names = ("tokenizer.json", "tokenizer.model")
  if any((checkpoint / name).exists() for name in names):
    folder = checkpoint_layouts.find_tokenizer_folder(checkpoint)
  else:
    folder, template = run_lib.resolve_checkpoint(run_lib.BUILTIN + "tiny"), "brief"
  tokenizer = tokenization.load_tokenizer(folder)
  own = tokenization.get_template(template)
  return tokenizer, own, stop_tokens.read_stops(folder, tokenizer, own)
