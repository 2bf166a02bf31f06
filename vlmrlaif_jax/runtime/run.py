"""The run: models and variables on the mesh, data and video features.

`Run` is what stages and programs receive; loading.create_run returns one.
"""

import importlib.resources
import pathlib
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import (
  UserError,
  check_at_least,
  check_choices,
  user_errors,
)
from vlmrlaif_jax.core.interrupts import NO_MONITOR, StageMonitor
from vlmrlaif_jax.core.types import Params, Stops
from vlmrlaif_jax.data import features, pipeline, tokenization
from vlmrlaif_jax.data.processors import interface
from vlmrlaif_jax.data.prompts import PROMPT_STYLES, Prompts
from vlmrlaif_jax.data.templates import CONVERSATION_TEMPLATES
from vlmrlaif_jax.data.video import Media, MediaList, list_media
from vlmrlaif_jax.huggingface import peft_adapters
from vlmrlaif_jax.models import decoder, vlm
from vlmrlaif_jax.models.decoders import llama, qwen2
from vlmrlaif_jax.models.ops import attention, quantization
from vlmrlaif_jax.runtime.arrays import SAVED, ArrayFactory

DTYPES = ("float32", "bfloat16", "float16")
GRIDS = ("few", "exact")  # Sizes of frames of families whose videos differ in size.
# Models that the planner uses where a path has no checkpoint: keys of families.FAMILIES
# with a size of the family, and LLaVAs as (decoder, shape, vision tower), of which one
# has 100 M parameters.
PLANNED_FAMILIES = {
  "qwen3vl_2b": ("qwen3_vl", "2b"),
  "qwen3vl_4b": ("qwen3_vl", "4b"),
  "qwen3vl_8b": ("qwen3_vl", "8b"),
  "qwen25vl_7b": ("qwen2_5_vl", "7b"),
  "onevision_7b": ("llava_onevision", "7b"),
  "smolvlm2_500m": ("smolvlm", "500m"),
}
PLANNED_SIZES = {
  "llava_7b": (llama, llama.VARIANTS["7b"], "l14_336"),
  "llava_13b": (llama, llama.VARIANTS["13b"], "l14_336"),
  "qwen2_1.5b": (qwen2, qwen2.VARIANTS["1.5b"], "l14_336"),
  "llava_100m": (llama, llama.VARIANTS["100m"], "tiny"),
}
BUILTIN = "builtin:"  # Prefix of checkpoints in the package, such as "builtin:tiny".


class Run(NamedTuple):
  """Models, variables, data and features that all stages of a run share."""

  config: ConfigDict
  workdir: pathlib.Path  # Folder of the run's outputs.
  mesh: Mesh
  policy: vlm.VLM
  reward_model: vlm.VLM  # Reward model and critic, with a scalar head.
  base: Params  # Frozen variables of the policy: "params", and "quant" if quantized.
  # Frozen variables of the reward model; the arrays of `base` for the same checkpoint.
  reward_model_base: Params
  tokenizer: tokenization.PreTrainedTokenizerBase
  template: tokenization.Template
  # Ids of the EOS tokens, which end a response; the template's own end is first.
  stops: Stops
  splits: pipeline.Splits
  features: features.FeatureStore
  processor: interface.Processor  # Reads videos as the family of the policy does.
  arrays: ArrayFactory = SAVED  # Source of trained parameters.
  watch: StageMonitor = NO_MONITOR  # Monitor of the running stage.

  def lay_out_video(
    self, media: Media, start: int = 0, stop: int | None = None
  ) -> interface.VideoTokens:
    """Returns the text and positions of a conversation's encoded videos and images.

    Args:
      media: one video, or several videos and images.
      start: first temporal patch of each video.
      stop: temporal patch after the last one; None for all.
    """
    layouts = map(self.features.get_layout, list_media(media))
    parts = [layout.select(start, stop) for layout in layouts]
    return interface.lay_out(self.processor, *parts)

  def refuse_several(self, media: Media) -> str:
    """Returns why the model cannot read several videos and images; "" if it can."""
    if self.processor.layout is None or not isinstance(media, MediaList):
      return ""
    return (
      f"it has {len(media.paths)} videos and images, but {self.config.model.path} "
      "reads one per conversation: keep one, or set model.path to a Qwen3-VL"
    )

  @property
  def prompts(self) -> Prompts:
    """The prompts that model.prompts selects."""
    return PROMPT_STYLES[self.config.model.prompts]


def default_config() -> ConfigDict:
  """Returns the settings of the section `model`."""
  return ConfigDict(
    dict(
      path=placeholder(str),  # A LLaVA checkpoint in Hugging Face's format.
      # Checkpoint of reward model and critic; "" for the policy's.
      reward_model_path="",
      tower="",  # A CLIP or SigLIP folder, for a checkpoint without a vision tower.
      template=placeholder(str),  # A key of templates.CONVERSATION_TEMPLATES.
      prompts=placeholder(str),  # A key of prompts.PROMPT_STYLES.
      # Frames per video, for a model that reads a fixed number.
      frames=placeholder(int),
      # Frames per second, for a model whose videos differ in length; 0 for its own.
      fps=0.0,
      max_frames=0,  # Largest number of frames of a video; 0 for the model's own.
      # Largest number of pixels of a video, which all its resized frames share; 0 for
      # the model's own.
      max_pixels=0,
      # Sizes of frames: "few" for a short list, so that the vision tower is compiled a
      # few times, or "exact" for those of the model's published processor.
      grids="few",
      clip_frames=placeholder(int),  # Frames per captioned clip.
      # Rank of the LoRA updates of reward model and RL, which are added to the frozen
      # update of SFT. Updates are multiplied by alpha / rank.
      lora_rank=placeholder(int),
      lora_alpha=placeholder(float),
      sft_lora_rank=placeholder(int),  # Rank of the LoRA updates of SFT.
      sft_lora_alpha=placeholder(float),
      # Dropout of the inputs of LoRA updates in SFT, the reward model and DPO. RL has
      # none, because the sampler's policy must be the trained one.
      lora_dropout=0.0,
      dtype="float32",  # Dtype of the computation.
      remat="none",  # "full" recomputes layers, "dots" all but matmuls; saves memory.
      attention="auto",  # "auto" or a key of attention.BACKENDS.
      # Whether SFT trains the merger of vision features, for a family other than LLaVA.
      # The saved features are then those before the merger: float16, and 0.6 to 2.5
      # times as wide in published sizes.
      train_merger=False,
      quant="none",  # Frozen layers as "nf4", "nf4_double" (QLoRA) or "int8".
      # Planned models for paths without a checkpoint: keys of PLANNED_SIZES or
      # PLANNED_FAMILIES.
      size="",
      reward_model_size="",
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the settings of the section `model`.

  Raises:
    UserError: a setting has an invalid value.
  """
  model = config.model
  with user_errors("model"):
    check_choices(model, {"quant": ("none", *quantization.SCHEMES)})
    check_choices(model, {"attention": ("auto", *attention.BACKENDS)})
    check_choices(model, {"dtype": DTYPES, "remat": tuple(decoder.REMAT)})
    check_choices(
      model,
      {"prompts": tuple(PROMPT_STYLES), "template": tuple(CONVERSATION_TEMPLATES)},
    )
    sizes = ("", *PLANNED_SIZES, *PLANNED_FAMILIES)
    check_choices(model, {"size": sizes, "reward_model_size": sizes})
    check_choices(model, {"grids": GRIDS})
    check_at_least(model, {"frames": 1, "clip_frames": 1})
    check_at_least(model, {"lora_rank": 1, "sft_lora_rank": 1, "lora_dropout": 0})
    if model.lora_dropout >= 1:
      raise ValueError(f"lora_dropout must be below 1, not {model.lora_dropout}")
    check_at_least(model, {"fps": 0, "max_frames": 0, "max_pixels": 0})


def resolve_checkpoint(path: str) -> pathlib.Path:
  """Returns the folder of a checkpoint.

  Args:
    path: a folder, or "builtin:" and the name of a checkpoint in the package.

  Raises:
    UserError: the folder contains no checkpoint.
  """
  if path.startswith(BUILTIN):
    name = path.removeprefix(BUILTIN)
    folder = pathlib.Path(str(importlib.resources.files("vlmrlaif_jax")))
    folder = folder / "assets" / name
  else:
    folder = pathlib.Path(path)
  # PEFT's adapters have no config.json.
  if (
    not (folder / "config.json").exists() and peft_adapters.find_adapter(folder) is None
  ):
    raise UserError(
      f"no checkpoint at {folder}: put a LLaVA checkpoint in Hugging Face's format"
      " there (config.json, *.safetensors, tokenizer files), or change"
      " --config.model.path"
    )
  return folder


def has_separate_reward_model(config: ConfigDict) -> bool:
  """Returns whether a recipe trains a reward model from a checkpoint of its own."""
  model = config.model
  return "rm" in config.stages and model.reward_model_path not in ("", model.path)
