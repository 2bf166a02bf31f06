"""What every program starts from: models and weights on the mesh, data, features."""

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
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import features, pipeline, tokenization
from vlmrlaif_jax.data.prompts import PROMPT_STYLES, Prompts
from vlmrlaif_jax.data.templates import CONVERSATION_TEMPLATES
from vlmrlaif_jax.huggingface import peft_adapters
from vlmrlaif_jax.models import decoder, llama, qwen2, vlm
from vlmrlaif_jax.models.ops import attention, quantization
from vlmrlaif_jax.runtime.arrays import SAVED, ArrayFactory

DTYPES = ("float32", "bfloat16", "float16")
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
  reward_model: vlm.VLM  # With a scalar head: the reward model and the critic.
  base: Params  # {"params": ...} of the policy, frozen; "quant" too if quantised.
  reward_model_base: (
    Params  # Of the scorer; the same arrays if it is the same checkpoint.
  )
  tokenizer: tokenization.PreTrainedTokenizerBase
  template: tokenization.Template
  eos: int  # The id that ends an answer.
  splits: pipeline.Splits
  features: features.FeatureStore
  arrays: ArrayFactory = SAVED  # Where parameters come from.
  watch: StageMonitor = NO_MONITOR  # Of the stage that is being run.

  @property
  def prompts(self) -> Prompts:
    """What the models are asked, in the words of model.prompts."""
    return PROMPT_STYLES[self.config.model.prompts]


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      path=placeholder(str),  # A LLaVA checkpoint in Hugging Face's form.
      # That of the reward model and critic, read if there is one; "": the same.
      reward_model_path="",
      tower="",  # A CLIP or SigLIP folder, for a checkpoint that has no vision tower.
      template=placeholder(str),  # A key of templates.TEMPLATES.
      prompts=placeholder(str),  # A key of prompts.STYLES.
      frames=placeholder(int),  # Of each video.
      clip_frames=placeholder(int),  # Of each part that is captioned by itself.
      lora_rank=placeholder(int),
      lora_alpha=placeholder(float),
      dtype="float32",  # Of the computation.
      remat="none",  # Recompute "full" layers, or all but "dots": less memory, slower.
      attention="auto",  # Or a backend of attention.attend; see loading.attention_of.
      quant="none",  # Of the frozen layers: "nf4", "nf4_double" (QLoRA) or "int8".
      # To plan with while nothing is at the paths: keys of PLANNED_SIZES.
      size="",
      reward_model_size="",
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `model`.

  Raises:
    UserError: a value is wrong.
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
    sizes = ("", *PLANNED_SIZES)
    check_choices(model, {"size": sizes, "reward_model_size": sizes})
    check_at_least(model, {"frames": 1, "clip_frames": 1, "lora_rank": 1})


def resolve_checkpoint(path: str) -> pathlib.Path:
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
  if (
    not (folder / "config.json").exists() and peft_adapters.find_adapter(folder) is None
  ):
    raise UserError(
      f"no checkpoint at {folder}: put there a LLaVA checkpoint in Hugging Face's form "
      "(config.json, *.safetensors, tokenizer files), or give another config.model.path"
    )
  return folder


def has_separate_reward_model(config: ConfigDict) -> bool:
  """Whether a recipe makes a reward model from another checkpoint than the policy's."""
  model = config.model
  return "rm" in config.stages and model.reward_model_path not in ("", model.path)
