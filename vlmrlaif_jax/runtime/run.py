"""What every program starts from: models and weights on the mesh, data, features."""

import importlib.resources
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.errors import (
  UserError,
  check_at_least,
  check_choices,
  user_errors,
)
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.interrupts import NO_WATCH, Watch
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import features, pipeline, records, tokenization
from vlmrlaif_jax.data.prompts import STYLES, Prompts
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.templates import TEMPLATES
from vlmrlaif_jax.data.video import VideoPath
from vlmrlaif_jax.huggingface import checkpoint_layouts, convert, peft_adapters
from vlmrlaif_jax.models import decoder, llama, qwen2, vlm
from vlmrlaif_jax.models.ops import attention, quantization
from vlmrlaif_jax.runtime import video_encoding
from vlmrlaif_jax.runtime.arrays import SAVED, Arrays

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "nf4", "nf4_double", "int8")
# Published models to plan with where no checkpoint is at a path, and one of 100 M
# parameters: (family, shape, vision tower).
PLANNED_SIZES = {
  "llava_7b": (llama, llama.VARIANTS["7b"], "l14_336"),
  "llava_13b": (llama, llama.VARIANTS["13b"], "l14_336"),
  "qwen2_1.5b": (qwen2, qwen2.VARIANTS["1.5b"], "l14_336"),
  "llava_100m": (llama, llama.VARIANTS["100m"], "tiny"),
}
BUILTIN = "builtin:"  # A checkpoint that the package ships: "builtin:tiny".


class Run(NamedTuple):
  """A run's models, weights, data and places; made once, used by all its stages."""

  config: ConfigDict
  workdir: pathlib.Path
  mesh: Mesh
  policy: vlm.VLM
  scorer: vlm.VLM  # With a scalar head: the reward model and the critic.
  base: Params  # {"params": ...} of the policy, frozen; "quant" too if quantised.
  scorer_base: Params  # Of the scorer; the same arrays if it is the same checkpoint.
  tokenizer: tokenization.PreTrainedTokenizerBase
  template: tokenization.Template
  eos: int  # The id that ends an answer.
  prompts: Prompts
  splits: pipeline.Splits
  features: features.Store
  arrays: Arrays = SAVED  # Where parameters come from.
  watch: Watch = NO_WATCH  # Of the stage that is being run.


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      path=placeholder(str),  # A LLaVA checkpoint in Hugging Face's form.
      # That of the reward model and critic, read if there is one; "": the same.
      scorer_path="",
      tower="",  # A CLIP or SigLIP folder, for a checkpoint that has no vision tower.
      template=placeholder(str),  # A key of templates.TEMPLATES.
      prompts=placeholder(str),  # A key of prompts.STYLES.
      frames=placeholder(int),  # Of each video.
      clip_frames=placeholder(int),  # Of each part that is captioned by itself.
      lora_rank=placeholder(int),
      lora_alpha=placeholder(float),
      dtype="float32",  # Of the computation.
      remat="none",  # Recompute "full" layers, or all but "dots": less memory, slower.
      attention="auto",  # Or a backend of attention.attend; see attention_of.
      quant="none",  # Of the frozen layers: "nf4", "nf4_double" (QLoRA) or "int8".
      quant_kernel="xla",  # Or "pallas": NF4 on TPUs, never written in 16 bits.
      # To plan with while nothing is at the paths: keys of PLANNED_SIZES.
      size="",
      scorer_size="",
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `model`.

  Raises:
    UserError: a value is wrong.
  """
  model = config.model
  kernels = {"quant_kernel": tuple(quantization.BACKENDS), "quant": QUANTIZATIONS}
  with user_errors("model"):
    check_choices(model, kernels)
    check_choices(model, {"attention": ("auto", *attention.BACKENDS)})
    check_choices(model, {"dtype": DTYPES, "remat": tuple(decoder.REMAT)})
    check_choices(model, {"prompts": tuple(STYLES), "template": tuple(TEMPLATES)})
    sizes = ("", *PLANNED_SIZES)
    check_choices(model, {"size": sizes, "scorer_size": sizes})
    check_at_least(model, {"frames": 1, "clip_frames": 1, "lora_rank": 1})
    _check_quant_kernel(model)


def resolve(path: str) -> pathlib.Path:
  """The folder of a checkpoint.

  Raises:
    UserError: there is none; the message says what to put there.
  """
  if path.startswith(BUILTIN):
    name = path.removeprefix(BUILTIN)
    folder = pathlib.Path(str(importlib.resources.files("vlmrlaif_jax")))
    folder = folder / "assets" / name
  else:
    folder = pathlib.Path(path)
  # PEFT's adapters have no config.json.
  if not (folder / "config.json").exists() and peft_adapters.find(folder) is None:
    raise UserError(
      f"no checkpoint at {folder}: put there a LLaVA checkpoint in Hugging Face's form "
      "(config.json, *.safetensors, tokenizer files), or give another config.model.path"
    )
  return folder


def make(
  config: ConfigDict,
  workdir: pathlib.Path,
  note: Callable[[str], None] = distributed.tell,
  watch: Watch = NO_WATCH,
) -> Run:
  """Loads models and data, and encodes all videos that are not encoded yet.

  Writes checkpoints.json: which layout each model was found in.

  Args:
    note: takes a line of text that tells how far it is.
    watch: asked between batches of videos whether to end.
  """
  mesh = sharding.make_mesh(**config.mesh)
  policy, base, scorer, scorer_base = _load_models(config, workdir, mesh, note)
  splits = _load_splits(config, workdir / "world")
  videos = _videos_of(config, workdir, splits)
  store = video_encoding.make_store(
    config, workdir, mesh, policy, base, videos, note, watch
  )
  splits = _without_failures(splits, store)
  if splits.problems:
    kept = {e["id"] for part in splits[:-1] for e in part}
    total = len(kept) + len(splits.problems)
    note(records.report_problems(splits.problems, total=total))
  folder = checkpoint_layouts.tokenizer_folder(resolve(config.model.path))
  tokenizer = tokenization.load_tokenizer(folder)
  template = tokenization.template_named(config.model.template)
  return Run(
    config,
    workdir,
    mesh,
    policy,
    scorer,
    base,
    scorer_base,
    tokenizer,
    template,
    tokenization.end_id(tokenizer, template),
    STYLES[config.model.prompts],
    splits,
    store,
  )


def own_scorer(config: ConfigDict) -> bool:
  """Whether a recipe makes a reward model from another checkpoint than the policy's."""
  model = config.model
  return "rm" in config.stages and model.scorer_path not in ("", model.path)


def _load_models(
  config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, note: Callable[[str], None]
) -> tuple[vlm.VLM, Params, vlm.VLM, Params]:
  """(policy, its weights, scorer, its weights), told of in checkpoints.json."""
  model = config.model
  policy_path = resolve(model.path)
  read: list[str] = []  # A line for each checkpoint.
  scorer_path = policy_path
  if own_scorer(config) or (workdir / "rm").exists():  # Of an earlier recipe.
    scorer_path = resolve(model.scorer_path or model.path)

  def tell(line: str) -> None:
    read.append(line)
    note(line)

  policy, base, _ = load(model, policy_path, mesh, tell, scalar_head=False)
  scorer, scorer_base = policy.clone(scalar_head=True), base
  if scorer_path != policy_path:
    scorer, scorer_base, _ = load(model, scorer_path, mesh, tell, scalar_head=True)
  _check_same_tower(policy, base, scorer, scorer_base)
  layouts = {"policy": read[0], "scorer": read[-1]}
  workdir.mkdir(parents=True, exist_ok=True)
  distributed.once(lambda: write_json(workdir / "checkpoints.json", layouts))
  return policy, base, scorer, scorer_base


def load(
  model: ConfigDict,
  path: pathlib.Path,
  mesh: Mesh,
  note: Callable[[str], None],
  *,
  scalar_head: bool,
) -> tuple[vlm.VLM, Params, convert.Config]:
  """What convert.load_llava returns, by the section "model" of a config.

  Raises:
    ValueError: as load_llava.
    UserError: model.quant_kernel cannot be used on the mesh.
  """
  _check_kernel_mesh(model, mesh)
  made, variables, config = convert.load_llava(
    path,
    rank=model.lora_rank,
    alpha=model.lora_alpha,
    dtype=model.dtype,
    remat=model.remat,
    scalar_head=scalar_head,
    mesh=mesh,
    tower=model.tower,
    attention=attention_of(model, mesh),
    quant=model.quant,
    quant_kernel=model.quant_kernel,
    note=note,
  )
  llm = made.llm.clone(unstack=on_cpu(mesh))
  return made.clone(llm=llm), variables, config


def on_cpu(mesh: Mesh) -> bool:
  return mesh.devices.flat[0].platform == "cpu"


def attention_of(model: ConfigDict, mesh: Mesh) -> str:
  """The language model's attention of whole rows; "auto" is what suits the devices:
  "chunked" on CPUs, and elsewhere "xla", which needs no kernel.
  """
  if model.attention != "auto":
    return model.attention
  return "chunked" if on_cpu(mesh) else "xla"


def _check_quant_kernel(model: ConfigDict) -> None:
  if model.quant_kernel == "pallas" and model.quant not in ("nf4", "nf4_double"):
    raise ValueError(
      f'quant_kernel="pallas" is for NF4, not for model.quant={model.quant!r}: set '
      "model.quant=nf4 or nf4_double, or model.quant_kernel=xla"
    )


def _check_kernel_mesh(model: ConfigDict, mesh: Mesh) -> None:
  tensor = mesh.shape["tensor"]
  if model.quant_kernel == "pallas" and tensor > 1:
    raise UserError(
      f'model.quant_kernel="pallas" cannot split matrices over mesh.tensor={tensor} '
      "devices: set mesh.tensor=1, or model.quant_kernel=xla"
    )


def _load_splits(config: ConfigDict, folder: pathlib.Path) -> pipeline.Splits:
  """The splits; the embedded world is rendered by process 0 before others read it."""
  load = lambda: pipeline.load(config.data, folder, seed=config.seed)
  if distributed.several():
    distributed.once(lambda: load() and None)
  return load()


def _videos_of(
  config: ConfigDict, workdir: pathlib.Path, splits: pipeline.Splits
) -> list[VideoPath]:
  """Every video of every split, and of the preferences that are given."""
  videos: list[VideoPath] = [e["video"] for part in splits[:-1] for e in part]
  if "rm" in config and config.rm.preferences:
    given, _ = records.read_preferences(
      config.rm.preferences, videos=videos_folder(config, workdir)
    )
    videos += [pair["video"] for pair in given]
  return videos


def videos_folder(config: ConfigDict, workdir: pathlib.Path) -> str | pathlib.Path:
  """The folder that the records name their videos from."""
  return config.data.videos or workdir / "world" / "videos"


def _check_same_tower(
  policy: vlm.VLM, base: Params, scorer: vlm.VLM, scorer_base: Params
) -> None:
  """Refuses a reward model that would be shown another tower's features."""
  if scorer_base is base:
    return
  both = [video_encoding.settings_of(model.vision) for model in (policy, scorer)]
  differing = [
    f"{name} is {both[0][name]} and {both[1][name]}"
    for name in both[0]
    if both[0][name] != both[1][name]
  ]
  if differing:
    raise ValueError(
      "model.path and model.scorer_path read their vision towers differently: "
      f"{'; '.join(differing)}. Videos are encoded once, for both: give checkpoints "
      "that share a frozen tower"
    )
  # One of them may have been kept in float16 and the other in bfloat16.
  close = lambda a, b: a.shape == b.shape and jnp.allclose(a, b, rtol=0.02, atol=1e-3)
  towers = base["params"]["vision"], scorer_base["params"]["vision"]
  if not all(jax.tree.leaves(jax.tree.map(close, *towers))):
    raise ValueError(
      "model.path and model.scorer_path hold different vision towers; videos are "
      "encoded once, for both: give checkpoints that share a frozen tower"
    )


def _without_failures(
  splits: pipeline.Splits, store: features.Store
) -> pipeline.Splits:
  """The splits without the samples whose video cannot be read, which are told of."""

  def readable(part: Sequence[Example]) -> list[Example]:
    return [e for e in part if store.has(e["video"])]

  problems = splits.problems + [
    records.Problem(e["id"], store.failures[features.name_of(e["video"])])
    for part in splits[:-1]
    for e in part
    if not store.has(e["video"])
  ]
  return pipeline.Splits(
    readable(splits.sft),
    readable(splits.prompts),
    readable(splits.benchmark),
    readable(splits.shifted),
    # A record may stand in two splits: that of the prompts is often that of SFT.
    list(dict.fromkeys(problems)),
  )


def shown_video(run: Run, example: Example) -> str | None:
  """A video as the report finds it, also in a workdir that was moved."""
  if not isinstance(example["video"], str):
    return None  # Single frames: the report shows no strip of them.
  path, folder = pathlib.Path(example["video"]), run.workdir / "world" / "videos"
  return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
