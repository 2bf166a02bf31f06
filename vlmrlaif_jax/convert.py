"""Published checkpoints into our models and back, by each family's HF table."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import CLIPConfig

from vlmrlaif_jax import adapters, layouts, sharding
from vlmrlaif_jax import tensors as files
from vlmrlaif_jax.data import text as texts
from vlmrlaif_jax.layouts import Config
from vlmrlaif_jax.models import clip, llama, lora, projector, vlm
from vlmrlaif_jax.models.vlm import VLM
from vlmrlaif_jax.tables import Table, Tensors, from_hf, their_shapes, to_hf
from vlmrlaif_jax.types import Batch, Params

LLAVA: Table = {
  f"{ours}/{path}": (theirs + name, op)
  for ours, theirs, table in (
    ("vision", "vision_tower.vision_model.", clip.HF_VISION),
    ("projector", "multi_modal_projector.", projector.HF),
    ("llm", "language_model.", llama.HF),
  )
  for path, (name, op) in table.items()
}

HEAD: Table = {"kernel": ("weight", "T"), "bias": ("bias", "")}

# Our fields -> theirs.
_LLM = {
  "vocab": "vocab_size",
  "embed": "hidden_size",
  "mlp": "intermediate_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "eps": "rms_norm_eps",
}
_TOWER = {
  "embed": "hidden_size",
  "mlp": "intermediate_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "activation": "hidden_act",
  "eps": "layer_norm_eps",
}
_VISION = {"image": "image_size", "patch": "patch_size", **_TOWER}
_TEXT = {"vocab": "vocab_size", "context": "max_position_embeddings", **_TOWER}


def load_llava(
  folder: str | Path,
  *,
  rank: int = 0,
  alpha: float = 16.0,
  dtype: str = "bfloat16",
  remat: bool = True,
  scalar_head: bool = False,
  mesh: Mesh | None = None,
  tower: str = "",
  note: Callable[[str], None] = lambda line: None,
) -> tuple[VLM, Params, Config]:
  """A checkpoint folder as our model, its "params" and its config as LLaVA's.

  Nothing is placed on a device before all that can be wrong with it is checked.

  Args:
    folder: of any layout that layouts.find knows.
    rank: of the LoRA updates of the language model; 0 for none.
    alpha: of those updates.
    dtype: of the computation, and of the tower's and language model's parameters.
      The projector's are in float32, since some stages train them.
    remat: whether to recompute each layer in the backward pass.
    scalar_head: whether the model has one; its parameters are not in the folder.
    mesh: where the parameters are to be, by their sharding rules; None: on the host.
    tower: folder of a CLIP, for a language model that comes without one.
    note: takes a line that tells which layout was found, and how fast it was read.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: files that are damaged, or that do not fit each other.
  """
  folder = Path(folder)
  layout = layouts.find(folder, tower=tower)
  settings = dict(rank=rank, alpha=alpha, dtype=dtype, remat=remat)
  model = llava_model(layout.config, scalar_head=scalar_head, **settings)
  _check_vocabulary(folder, layout.config["text_config"]["vocab_size"])
  shapes = param_shapes(llava_model(layout.config, scalar_head=False, **settings))
  at = None
  if mesh is not None:
    at = sharding.shard_by_rules({"params": shapes}, vlm.SHARDING, mesh)["params"]
  told = f"{folder.name}: {layout.line()}"
  params = _read(LLAVA, layout.tensors, shapes, at, lambda how: note(f"{told}; {how}"))
  return model, params, layout.config


def llava_model(
  config: Config,
  *,
  rank: int = 0,
  alpha: float = 16.0,
  dtype: str = "bfloat16",
  remat: bool = True,
  scalar_head: bool = False,
) -> VLM:
  """Our model of a layout's config; see load_llava.

  Raises:
    ValueError: the config asks for what our layers do not do.
  """
  text = config["text_config"]
  _check(
    config, vision_feature_select_strategy="default", multimodal_projector_bias=True
  )
  _check(text, hidden_act="silu", attention_bias=False, tie_word_embeddings=False)
  _check(text["rope_parameters"], rope_type="default")
  types = dict(dtype=dtype, param_dtype=dtype)
  return VLM(
    vision=clip.VisionTower(
      **_take(_VISION, config["vision_config"]),
      select_layer=config["vision_feature_layer"],
      **types,
    ),
    projector=projector.Projector(
      text["hidden_size"],
      activation=config["projector_hidden_act"],
      depth=config["projector_depth"],
      dtype=dtype,
    ),
    llm=llama.Model(
      **_take(_LLM, text),
      rope_base=text["rope_parameters"]["rope_theta"],
      rank=rank,
      alpha=alpha,
      remat=remat,
      **types,
    ),
    scalar_head=scalar_head,
  )


def _read(table: Table, tensors: Tensors, shapes: Params, at, told) -> Params:
  """from_hf, with a bar; `told` takes how much came and how fast."""
  total, start = sum(map(files.nbytes, tensors.values())), time.monotonic()
  with files.progress("loading", total) as came:
    params = from_hf(table, tensors, shapes, at, came)
  seconds = time.monotonic() - start
  gigabytes = total / 1e9
  told(f"{gigabytes:.2f} GB in {seconds:.1f} s ({gigabytes / seconds:.2f} GB/s)")
  return params


def _check_vocabulary(folder: Path, vocab: int) -> None:
  """Refuses a tokenizer whose ids the embedding has no rows for."""
  if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model")):
    return
  highest = max(texts.load_tokenizer(folder).get_vocab().values())
  if highest >= vocab:
    raise ValueError(
      f"the tokenizer in {folder} has ids up to {highest}, but the model's vocab_size "
      f"is {vocab}: it is another model's tokenizer, or the model has not been resized "
      "to the tokens that were added to it"
    )


def _take(fields: Mapping[str, str], config: Config) -> dict[str, Any]:
  return {ours: config[theirs] for ours, theirs in fields.items()}


def _check(config: Config, **supported):
  for name, value in supported.items():
    if config[name] != value:
      raise ValueError(f"{name} must be {value!r}, not {config[name]!r}")


def load_adapter(folder: str | Path, model: VLM) -> Params:
  """What an adapter folder lays over a base: {"lora": ..., "params": ...}.

  "params" holds the projector and the scalar head, if the folder has them and the
  model too. NumPy arrays; see types.join.

  Args:
    folder: PEFT's, the original LLaVA's or VLM-RLAIF's.
    model: of the base; its rank and alpha are the adapter's.

  Raises:
    ValueError: the adapter is of another model, rank, alpha, or set of matrices.
  """
  adapter = adapters.read(Path(folder), layouts.published_name)
  for name, ours, theirs in (
    ("lora_rank", model.llm.rank, adapter.rank),
    ("lora_alpha", model.llm.alpha, adapter.alpha),
  ):
    if ours != theirs:
      raise ValueError(
        f"the adapter in {folder} has {name} {theirs}, but the model was made with "
        f"{ours}: set config.model.{name}={theirs}"
      )
  shapes = _shapes(model)
  params = shapes["params"]
  llm = {"llm": params["llm"]}
  adapters.check_fits(adapter, their_shapes(LLAVA, llm))
  factors = {
    f"{module}.lora_{side}.weight": files.whole(x)
    for module, pair in adapter.factors.items()
    for side, x in pair.items()
  }
  found = {"lora": lora.from_peft(factors, shapes["lora"], LLAVA, prefix="")}
  beside = {}
  if adapter.rest:
    beside = from_hf(LLAVA, adapter.rest, {"projector": params["projector"]})
  if adapter.head and model.scalar_head:
    beside["head"] = from_hf(HEAD, adapter.head, params["head"])
  return {**found, "params": beside} if beside else found


def param_shapes(model: VLM) -> Params:
  """Shapes and dtypes of a VLM's "params"; computes nothing."""
  return _shapes(model)["params"]


def _shapes(model: VLM) -> Params:
  size = model.vision.image
  tokens = jnp.zeros((1, 1), int)
  batch = Batch(jnp.zeros((1, 1, size, size, 3)), tokens, tokens == 0, tokens == 0)
  return jax.eval_shape(model.init, jax.random.key(0), batch)


def llava_config(model: VLM, *, image_token: int) -> Config:
  """The config.json of a VLM that was not loaded from one.

  Args:
    model: of this project.
    image_token: the id that stands for the video in prompts given to transformers.
  """
  give = lambda fields, part: {fields[f]: part.__dict__[f] for f in fields}
  llm, vision = model.llm, model.vision
  text = {
    **give(_LLM, llm),
    "head_dim": llm.head_dim or llm.embed // llm.heads,
    "rope_parameters": {"rope_type": "default", "rope_theta": llm.rope_base},
    "model_type": "llama",
  }
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": image_token,
    "image_seq_length": (vision.image // vision.patch) ** 2,
    "projector_hidden_act": model.projector.activation,
    "projector_depth": model.projector.depth,
    "vision_feature_layer": vision.select_layer,
    "vision_feature_select_strategy": "default",
    "text_config": text,
    "vision_config": {**give(_VISION, vision), "model_type": "clip_vision_model"},
  }


def save_llava(
  folder: str | Path, params: Params, config: Config, dtype: str = "float16"
):
  """Writes what transformers loads as a LlavaForConditionalGeneration.

  Args:
    folder: gets config.json and model.safetensors, or several files and an index.
    params: of a VLM without a head; LoRA updates are to be merged before.
    config: as load_llava or llava_config returns it.
    dtype: of the tensors that are written.
  """
  depth = config["projector_depth"]
  if depth != 2:
    raise ValueError(f"transformers' LLaVA has a projector of 2 layers, not {depth}")
  rest = {key: value for key, value in config.items() if key != "projector_depth"}
  _save(Path(folder), LLAVA, params, rest, dtype)


def widened(params: Params, config: Config) -> tuple[Params, Config]:
  """Both with room for the id that stands for an image in transformers.

  The original LLaVA's vocabulary has none. The new rows are those of id 0, <unk>:
  the model is never more likely to say an added token than that one.
  """
  text = config["text_config"]
  more = config["image_token_index"] + 1 - text["vocab_size"]
  if more <= 0:
    return params, config
  llm = params["llm"]
  rows, head = llm["embed"]["embedding"], llm["lm_head"]["kernel"]
  embed = {"embedding": jnp.concatenate([rows, *[rows[:1]] * more])}
  lm_head = {"kernel": jnp.concatenate([head, *[head[:, :1]] * more], axis=1)}
  wide = {**params, "llm": {**llm, "embed": embed, "lm_head": lm_head}}
  text = {**text, "vocab_size": text["vocab_size"] + more}
  return wide, {**config, "text_config": text}


def _save(folder: Path, table: Table, params: Params, config: Config, dtype: str):
  kind = jnp.dtype(dtype)
  cast = ((name, np.asarray(x, kind)) for name, x in to_hf(table, params))
  files.write_folder(folder, cast)
  (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2))


def load_clip(
  folder: str | Path, *, dtype: str = "float32"
) -> tuple[clip.CLIP, Params, Config]:
  """A CLIPModel folder as our model, its "params" and config."""
  folder = Path(folder)
  config = CLIPConfig.from_pretrained(folder).to_dict()
  types = dict(dtype=dtype, param_dtype=dtype)
  model = clip.CLIP(
    clip.VisionTower(**_take(_VISION, config["vision_config"]), **types),
    clip.TextTower(**_take(_TEXT, config["text_config"]), **types),
    config["projection_dim"],
  )
  pixels = jnp.zeros((1, model.vision.image, model.vision.image, 3))
  tokens = jnp.zeros((1, 1), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), pixels, tokens, tokens == 0)
  held, _ = layouts.opened(folder, rename=lambda name: name)
  return model, from_hf(clip.HF, held, shapes["params"]), config


def clip_config(model: clip.CLIP, *, end: int) -> Config:
  """The config.json of a CLIP that was not loaded from one.

  Args:
    end: the id that ends a caption, where the text tower is read.
  """
  give = lambda fields, part: {fields[f]: part.__dict__[f] for f in fields}
  return {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": model.features,
    "text_config": {
      **give(_TEXT, model.text),
      "model_type": "clip_text_model",
      "eos_token_id": end,
    },
    "vision_config": {**give(_VISION, model.vision), "model_type": "clip_vision_model"},
  }


def save_clip(folder: str | Path, params: Params, config: Config, dtype="float32"):
  """Writes what transformers loads as a CLIPModel.

  Args:
    config: as load_clip or clip_config returns it.
  """
  _save(Path(folder), clip.HF, params, config, dtype)
