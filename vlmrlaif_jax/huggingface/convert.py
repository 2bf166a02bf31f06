"""Published checkpoints into our models and back, by each family's HF table."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import tokenization as texts
from vlmrlaif_jax.huggingface import checkpoint_layouts
from vlmrlaif_jax.huggingface import tensor_files as files
from vlmrlaif_jax.huggingface.checkpoint_layouts import (
  DECODER_FAMILIES,
  TOWER_FAMILIES,
  HfConfig,
  read_fields,
  write_fields,
)
from vlmrlaif_jax.huggingface.param_mapping import (
  NameTable,
  PackedKernel,
  from_hf,
  to_hf,
)
from vlmrlaif_jax.models import llama, projector, siglip, vlm
from vlmrlaif_jax.models.layers import DTypes
from vlmrlaif_jax.models.ops.quantization import SCHEMES, quantize_params
from vlmrlaif_jax.models.vlm import VLM, get_param_shapes

# Which of a tower's tokens LLaVA reads: CLIP's "default" is all but the class token.
_SELECT = {"clip_vision_model": "default", "siglip_vision_model": "full"}

# What a language model's config must say beside its sizes.
_PLAIN = {
  "llama": dict(attention_bias=False),
  "qwen2": dict(use_sliding_window=False),
  "qwen3": dict(attention_bias=False, use_sliding_window=False),
}

HEAD_TABLE: NameTable = {"kernel": ("weight", "T"), "bias": ("bias", "")}


def get_model_types(model: VLM) -> tuple[str, str]:
  """The model_types of a VLM's language model and tower."""
  text = "qwen3" if model.llm.qk_norm else "qwen2" if model.llm.qkv_bias else "llama"
  is_siglip = isinstance(model.vision, siglip.Model)
  return text, "siglip_vision_model" if is_siglip else "clip_vision_model"


def load_llava(
  folder: str | Path,
  *,
  dtype: str = "bfloat16",
  mesh: Mesh | None = None,
  tower: str = "",
  quant: str = "none",
  note: Callable[[str], None] = lambda line: None,
) -> tuple[VLM, Params, HfConfig]:
  """A checkpoint folder as our model, its variables and its config as LLaVA's.

  Nothing is placed on a device before all that can be wrong with it is checked. What no
  checkpoint says, such as LoRA's rank, has the defaults of Decoder: clone `llm` with
  other values.

  Args:
    folder: of any layout that checkpoint_layouts.find knows.
    dtype: of the computation, and of the tower's and language model's parameters.
      The projector's are in float32, since some stages train them.
    mesh: where the parameters are to be, by their sharding rules; None: on the host.
    tower: folder of a CLIP or SigLIP, for a language model that comes without one.
    quant: "none", or a key of quantization.SCHEMES: the kernels of the language model's
      layers are in that form, in a collection "quant" beside "params". Each layer is
      quantised once it is read: they are never on the devices as they were.
    note: takes a line that tells which layout was found, and how fast it was read.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: files that are damaged, or that do not fit each other.
  """
  folder = Path(folder)
  layout = checkpoint_layouts.find_layout(folder, tower=tower)
  model = make_llava_model(layout.config, dtype)
  _check_vocabulary(folder, layout.config["text_config"]["vocab_size"])
  total, start = sum(x.nbytes for x in layout.tensors.values()), time.monotonic()
  with files.show_read_progress(total) as came:
    variables = _read(layout.tensors, model, mesh, quant, came)
  seconds, gigabytes = time.monotonic() - start, total / 1e9
  speed = f"{gigabytes:.2f} GB in {seconds:.1f} s ({gigabytes / seconds:.2f} GB/s)"
  note(f"{folder.name}: {'; '.join((layout.name, *layout.notes, speed))}")
  return model, variables, layout.config


def _read(
  tensors: files.Tensors,
  model: VLM,
  mesh: Mesh | None,
  quant: str,
  came: Callable[[int], None],
) -> Params:
  """The variables of a model; see from_hf."""
  shapes = get_param_shapes(model)
  kept = get_stored_shapes(shapes, quant)
  table = checkpoint_layouts.make_llava_table(*get_model_types(model))
  if mesh is None:
    read = from_hf(table, tensors, shapes, came=came)
    return {"params": read} if quant == "none" else _quantised(read, quant)
  both = {"params": shapes, "quant": kept.get("quant", {})}
  at = sharding.shard_by_rules(both, vlm.SHARDING, mesh)
  kernels = flatten_dict(
    at["quant"], sep="/", is_leaf=lambda path, tree: "codes" in tree
  )
  packed = {
    f"{path}/kernel": PackedKernel(SCHEMES[quant], x) for path, x in kernels.items()
  }
  found = flatten_dict(from_hf(table, tensors, shapes, at["params"], came, packed))
  return unflatten_dict({path: found[path[1:]] for path in flatten_dict(kept)})


def get_stored_shapes(shapes: Params, quant: str) -> Params:
  """The shapes of variables, of those of "params" before they are quantised."""
  if quant == "none":
    return {"params": shapes}
  if quant not in SCHEMES:
    raise ValueError(f'quant must be "none" or one of {sorted(SCHEMES)}, not {quant!r}')
  return jax.eval_shape(functools.partial(_quantised, quant=quant), shapes)


def _quantised(params: Params, quant: str) -> Params:
  return quantize_params(params, llama.QUANTIZED, scheme=quant)


def make_llava_model(config: HfConfig, dtype: str) -> VLM:
  """Our model of a layout's config; see load_llava.

  Raises:
    ValueError: the config asks for what our layers do not do.
  """
  text, vision = config["text_config"], config["vision_config"]
  kind = vision["model_type"]
  _check(
    config, vision_feature_select_strategy=_SELECT[kind], multimodal_projector_bias=True
  )
  _check(text, hidden_act="silu", **_PLAIN[text["model_type"]])
  _check(text["rope_parameters"], rope_type="default")
  decoder, tower = DECODER_FAMILIES[text["model_type"]], TOWER_FAMILIES[kind]
  types = DTypes(dtype=dtype, param_dtype=dtype)
  return VLM(
    vision=tower.Model(
      **read_fields(tower.CONFIG, vision),
      select_layer=config["vision_feature_layer"],
      **types,
    ),
    projector=projector.Projector(
      text["hidden_size"],
      activation=config["projector_hidden_act"],
      depth=config["projector_depth"],
      dtype=dtype,
    ),
    llm=decoder.Model(**read_fields(decoder.CONFIG, text), **types),
  )


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


def _check(config: HfConfig, **supported):
  for name, value in supported.items():
    if config[name] != value:
      raise ValueError(f"{name} must be {value!r}, not {config[name]!r}")


def make_llava_config(model: VLM, *, image_token: int) -> HfConfig:
  """The config.json of a VLM that was not loaded from one.

  Args:
    image_token: the id that stands for the video in prompts given to transformers.
  """
  llm, vision, made = model.llm, model.vision, model.projector
  kind, tower = get_model_types(model)
  text = {**write_fields(DECODER_FAMILIES[kind].CONFIG, llm), "model_type": kind}
  if "head_dim" in text:
    text["head_dim"] = llm.head_dim or llm.embed // llm.heads
  text["rope_parameters"]["rope_type"] = "default"
  seen = {**write_fields(TOWER_FAMILIES[tower].CONFIG, vision), "model_type": tower}
  if tower == "siglip_vision_model":
    seen["vision_use_head"] = False
  return {
    **checkpoint_layouts.join_configs(text, seen, vision.select_layer, made.depth),
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": image_token,
    "projector_hidden_act": made.activation,
    "tie_word_embeddings": llm.tied,
  }


def save_llava(
  folder: str | Path, params: Params, config: HfConfig, dtype: str = "float16"
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
  families = (config[f"{part}_config"]["model_type"] for part in ("text", "vision"))
  save_tensors(
    Path(folder), checkpoint_layouts.make_llava_table(*families), params, rest, dtype
  )


def add_image_token(params: Params, config: HfConfig) -> tuple[Params, HfConfig]:
  """Both with room for the id that stands for an image in transformers.

  The original LLaVA's vocabulary has none. The new rows are those of id 0, <unk>:
  the model is never more likely to say an added token than that one.
  """
  text = config["text_config"]
  more = config["image_token_index"] + 1 - text["vocab_size"]
  if more <= 0:
    return params, config
  llm = params["llm"]
  rows = llm["embed"]["embedding"]
  wide = {**llm, "embed": {"embedding": jnp.concatenate([rows, *[rows[:1]] * more])}}
  if "lm_head" in llm:  # Or it is the embedding.
    head = llm["lm_head"]["kernel"]
    wide["lm_head"] = {"kernel": jnp.concatenate([head, *[head[:, :1]] * more], axis=1)}
  text = {**text, "vocab_size": text["vocab_size"] + more}
  return {**params, "llm": wide}, {**config, "text_config": text}


def save_tensors(
  folder: Path, table: NameTable, params: Params, config: HfConfig, dtype: str
) -> None:
  """Writes params in their names by a family's table, and the config."""
  kind = jnp.dtype(dtype)
  cast = ((name, np.asarray(x, kind)) for name, x in to_hf(table, params))
  files.write_folder(folder, cast)
  write_json(folder / "config.json", {**config, "dtype": dtype})
