"""A run without weights: models, roles and batches as shapes, each with its place.

What is planned is what is run: the models of runtime/run.py, the rules of SHARDING, the
roles that runtime/role_params.py hands to each stage; only the arrays are not there.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree
from ml_collections import ConfigDict
from transformers import LlavaConfig

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Batch, Groups, Params, join
from vlmrlaif_jax.data import pipeline, tokenization
from vlmrlaif_jax.data.prompts import STYLES
from vlmrlaif_jax.huggingface import checkpoint_layouts, convert
from vlmrlaif_jax.models import clip, llama, projector, qwen2, shapes, vlm
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.run import Run

# (family, shape, vision tower) of published models, and of one of 100 M parameters
# that predictions are held against on a small machine.
SIZES = {
  "llava_7b": (llama, llama.VARIANTS["7b"], "l14_336"),
  "llava_13b": (llama, llama.VARIANTS["13b"], "l14_336"),
  "qwen2_1.5b": (qwen2, qwen2.VARIANTS["1.5b"], "l14_336"),
  "llava_100m": (llama, llama.VARIANTS["100m"], "tiny"),
}


class Roles(NamedTuple):
  """What a stage trains, and what it reads besides."""

  params: Params
  frozen: Params


def make(config: ConfigDict, mesh: Mesh) -> Run:
  """As build.make, with shapes for arrays; without videos and data.

  Raises:
    FileNotFoundError: no checkpoint at a path, and no size to plan with instead.
    ValueError: as build.make.
  """
  model = config.model
  policy, base = _load(model, model.path, model.size, mesh)
  scorer, scorer_base = policy, base
  if run_lib.own_scorer(config):
    size = model.scorer_size or model.size
    scorer, scorer_base = _load(model, model.scorer_path, size, mesh)
  tokenizer, template = _tokenizer(model.path, model.template)
  return Run(
    config=config,
    workdir=pathlib.Path(),
    mesh=mesh,
    policy=policy,
    scorer=scorer.clone(scalar_head=True),
    base=base,
    scorer_base=scorer_base,
    tokenizer=tokenizer,
    template=template,
    eos=tokenization.end_id(tokenizer, template),
    prompts=STYLES[model.prompts],
    splits=pipeline.Splits([], [], [], [], []),
    features=None,
  )


def _load(
  model: ConfigDict, path: str, size: str, mesh: Mesh
) -> tuple[vlm.VLM, Params]:
  """What build.load returns, in shapes."""
  made = convert.llava_model(
    _config(path, model.tower, size),
    rank=model.lora_rank,
    alpha=model.lora_alpha,
    dtype=model.dtype,
    remat=model.remat,
    attention=run_lib.attention_of(model, mesh),
    quant_kernel=model.quant_kernel,
  )
  held = convert.held_shapes(shapes.param_shapes(made), model.quant)
  llm = made.llm.clone(unstack=run_lib.on_cpu(mesh))
  return made.clone(llm=llm), placed(held, mesh)


def _config(path: str, tower: str, size: str) -> convert.Config:
  """The config of a checkpoint, of whose files config.json may be the only one."""
  try:
    folder = run_lib.resolve(path)
  except FileNotFoundError as error:
    if size in SIZES:
      return _published(size)
    raise FileNotFoundError(
      f"{error}; or, to plan without it, one of {sorted(SIZES)} as config.model.size "
      f"(and scorer_size), not {size!r}"
    ) from error
  if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
    return LlavaConfig.from_pretrained(folder).to_dict() | {"projector_depth": 2}
  return checkpoint_layouts.find(folder, tower=tower).config


@functools.lru_cache
def _published(size: str) -> convert.Config:
  family, shape, tower = SIZES[size]
  llm = family.Model(**shape)
  seen = clip.VisionTower(**clip.VARIANTS[tower])
  model = vlm.VLM(seen, projector.Projector(llm.embed), llm)
  config = convert.llava_config(model, image_token=llm.vocab)
  return LlavaConfig.from_dict(config).to_dict() | {"projector_depth": 2}


@functools.lru_cache
def _tokenizer(path: str, template: str):
  """(tokenizer, template) of a policy; the package's own if it has none yet.

  Of either, only a few ids and the length of a prompt come into a plan.
  """
  own = pathlib.Path(path)
  names = ("tokenizer.json", "tokenizer.model")
  if any((own / name).exists() for name in names):
    folder = checkpoint_layouts.tokenizer_folder(own)
  else:
    folder, template = run_lib.resolve(run_lib.BUILTIN + "tiny"), "brief"
  return tokenization.load_tokenizer(folder), tokenization.template_named(template)


# Shapes with their places.


def placed(tree: PyTree, mesh: Mesh) -> PyTree:
  """Shapes, each with the sharding that SHARDING gives it."""
  where = sharding.shard_by_rules(tree, vlm.SHARDING, mesh)
  return jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where
  )


def rowwise(tree: PyTree, mesh: Mesh) -> PyTree:
  """Shapes with their rows spread over the mesh, as sharding.put does it."""
  at = NamedSharding(mesh, sharding.ROWS)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree
  )


def scalar(mesh: Mesh, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(mesh, P()))


def key(mesh: Mesh) -> jax.ShapeDtypeStruct:
  """A random key."""
  return scalar(mesh, jax.eval_shape(lambda: jax.random.key(0)).dtype)


def batch(run: Run, rows: int, time: int, frames: int = 0) -> Batch:
  """A batch of features, as sharding.put hands it to the devices.

  Args:
    frames: of each video; those of the config unless given.
  """
  tower = run.policy.vision
  patches = (tower.image // tower.patch) ** 2
  frames = frames or run.config.model.frames
  shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype)
  video = shape((rows, frames, patches, tower.embed), jnp.float16)
  each = [shape((rows, time), kind) for kind in (jnp.int32, bool, bool)]
  return rowwise(Batch(video, *each), run.mesh)


def pairs(run: Run, rows: int, start: int, time: int) -> Groups:
  """Pairs of responses of so many tokens to prompts of `start` tokens."""
  shape = lambda kind: jax.ShapeDtypeStruct((rows, 2, time), kind)
  responses = rowwise([shape(kind) for kind in (jnp.int32, bool, bool)], run.mesh)
  return Groups(batch(run, rows, start), *responses)


# Roles, as those of runtime/role_params.py; they share the shapes of their base.


def policy_roles(run: Run) -> Roles:
  lora = {"lora": role_params.trainable(run.policy, run.mesh)["lora"]}
  # A copy stands before it is trained, and the trained one in the state.
  reference = {"lora": _copy(lora["lora"])}
  return Roles({"policy": lora}, {"policy": run.base, "ref": join(run.base, reference)})


def _copy(tree: PyTree) -> PyTree:
  """Shapes that are not taken for the same arrays."""
  return jax.tree.map(lambda x: x.update(), tree)


def sft_roles(run: Run) -> Roles:
  trained = {"projector": _copy(run.base["params"]["projector"])}
  lora = role_params.trainable(run.policy, run.mesh)["lora"]
  return Roles({"policy": {"lora": lora, "params": trained}}, {"policy": run.base})


def rm_roles(run: Run) -> Roles:
  return Roles(
    {"reward": role_params.trainable(run.scorer, run.mesh)}, {"reward": run.scorer_base}
  )


def reward_variables(run: Run) -> Params:
  return join(run.scorer_base, role_params.trainable(run.scorer, run.mesh))


def ppo_roles(run: Run) -> Roles:
  params, frozen = policy_roles(run)
  critic = role_params.trainable(run.scorer, run.mesh)
  more = {
    "reward": reward_variables(run),
    "critic": run.scorer_base,
    "kl_coef": scalar(run.mesh),
  }
  return Roles(params | {"critic": critic}, frozen | more)
