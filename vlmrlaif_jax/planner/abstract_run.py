"""A run without weights: its models, with shapes and shardings in place of arrays.

Stages make the same jobs of it as of a real run, because `Run.arrays` returns shapes.
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
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.huggingface import checkpoint_layouts, convert
from vlmrlaif_jax.models import clip, projector, vlm
from vlmrlaif_jax.runtime import loading
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.arrays import ArrayFactory, add_shardings
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.stage import get_stage


def create_abstract_run(config: ConfigDict, mesh: Mesh) -> Run:
  """As loading.make, with shapes for arrays; without videos and data.

  Raises:
    UserError: no checkpoint at a path, and no size to plan with instead.
  """
  model = config.model
  policy = scorer = _load(model, model.path, model.size, mesh)
  if run_lib.has_separate_reward_model(config):
    size = model.reward_model_size or model.size
    scorer = _load(model, model.reward_model_path, size, mesh)
  tokenizer, template = _tokenizer(model.path, model.template)
  return loading.create_run_of_models(
    config, pathlib.Path(), mesh, policy, scorer, tokenizer, template, ABSTRACT_ARRAYS
  )


class PlannedStage(NamedTuple):
  """A stage of a recipe by name, and what it runs on the devices."""

  name: str
  workload: Workload


def plan_recipe_stages(run: Run, names: Iterable[str]) -> Iterator[PlannedStage]:
  """Yields the stages of these names that run anything on the devices.

  Args:
    run: see `make`.
    names: names of stages, with their rounds.
  """
  for name in names:
    if (workload := get_stage(name).workload) is not None:
      yield PlannedStage(name, workload(run, name))


# Shapes in place of arrays: of every stage, as if it had been run.
ABSTRACT_ARRAYS = ArrayFactory(
  restore=lambda folder, like: like,
  has=lambda folder: True,
  initialize=lambda shapes, key: shapes,
  # They are not taken for the same arrays.
  zeros_like=lambda tree: jax.tree.map(lambda x: x.update(), tree),
)


def _load(
  model: ConfigDict, path: str, size: str, mesh: Mesh
) -> tuple[vlm.VLM, Params]:
  """What loading.load returns, in shapes."""
  made = convert.make_llava_model(_config(path, model.tower, size), model.dtype)
  held = convert.get_stored_shapes(vlm.get_param_shapes(made), model.quant)
  return loading.configure_model(made, model, mesh), add_shardings(held, mesh)


def _config(path: str, tower: str, size: str) -> convert.HfConfig:
  """The config of a checkpoint, of whose files config.json may be the only one."""
  try:
    folder = run_lib.resolve_checkpoint(path)
  except UserError as error:
    if size in run_lib.PLANNED_SIZES:
      return _published(size)
    sizes = ", ".join(run_lib.PLANNED_SIZES)
    raise UserError(
      f"{error}; or, to plan without it, one of {sizes} as config.model.size (and "
      f"reward_model_size), not {size!r}"
    ) from error
  if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
    return LlavaConfig.from_pretrained(folder).to_dict() | {"projector_depth": 2}
  return checkpoint_layouts.find_layout(folder, tower=tower).config


@functools.lru_cache
def _published(size: str) -> convert.HfConfig:
  family, shape, tower = run_lib.PLANNED_SIZES[size]
  llm = family.Model(**shape)
  seen = clip.VisionTower(**clip.VARIANTS[tower])
  model = vlm.VLM(seen, projector.Projector(llm.embed), llm)
  config = convert.make_llava_config(model, image_token=llm.vocab)
  return LlavaConfig.from_dict(config).to_dict() | {"projector_depth": 2}


@functools.lru_cache
def _tokenizer(path: str, template: str):
  """(tokenizer, template) of a policy; the package's own if it has none yet.

  Of either, only a few ids and the length of a prompt come into a plan.
  """
  own = pathlib.Path(path)
  names = ("tokenizer.json", "tokenizer.model")
  if any((own / name).exists() for name in names):
    folder = checkpoint_layouts.find_tokenizer_folder(own)
  else:
    folder, template = run_lib.resolve_checkpoint(run_lib.BUILTIN + "tiny"), "brief"
  return tokenization.load_tokenizer(folder), tokenization.get_template(template)
