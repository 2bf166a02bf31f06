"""Presets of other families, which change the preset "tiny" or "7b" of a recipe.

Every recipe has them, for example --config=configs/ppo.py:qwen3vl_4b. The checkpoint of
a published model is a folder in Hugging Face's format. The reward model has the same
checkpoint, because videos are encoded once for both.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

TEXT_LEN = 256  # Tokens of a prompt without the video.
LLAVA_LEN = 768  # data.prompt_len of the preset "7b", which is replaced.
# Pixels of a frame after resizing: 128 tokens of 28 x 28 pixels, as Video-R1
# (2503.21776) trains. ms-swift's examples for Qwen2.5-VL have 224 x 224.
FRAME_PIXELS = 128 * 28 * 28
# ms-swift and LLaMA-Factory train LoRA of Qwen-VL on all linear layers of the language
# model with a frozen tower and a learning rate of 1e-4. LLaMA-Factory's alpha is twice
# the rank, and its learning rate of DPO 5e-6.
LORA = dict(lora_rank=32, lora_alpha=64.0, sft_lora_rank=32, sft_lora_alpha=64.0)
LEARNING_RATES = {
  "sft": 1e-4,
  "rm": 2e-5,
  "ppo": 1e-5,
  "grpo": 1e-5,
  "grm_sft": 2e-5,
  "grm": 1e-5,
  "dpo": 5e-6,
}


class Derived(NamedTuple):
  """A preset that differs from another preset of a recipe."""

  base: str  # Preset that it is derived from.
  more: int  # Tokens by which the video of a prompt is longer.
  model: dict[str, Any]  # Changed settings of the section `model`.
  sections: dict[str, dict[str, Any]]  # Changed settings of other sections.


def _derive_published(
  preset: str, name: str, video_len: int, limits: dict[str, Any]
) -> Derived:
  """Returns the preset of a repository on the Hub, named without its owner."""
  model = dict(
    path=f"checkpoints/{name}",
    reward_model_path="",
    size=preset,
    reward_model_size="",
    template="chat_template",
    clip_frames=12,
    quant="none",
  )
  rates = {
    section: {"optimizer": {"learning_rate": rate}}
    for section, rate in LEARNING_RATES.items()
  }
  more = video_len + TEXT_LEN - LLAVA_LEN
  return Derived("7b", more, model | limits | LORA, rates)


_QWEN_LIMITS = dict(fps=2.0, max_frames=32, max_pixels=32 * FRAME_PIXELS)
PUBLISHED = {
  preset: _derive_published(preset, *model)
  for preset, *model in (  # Tokens of the longest video with its text, and its limits.
    ("qwen3vl_2b", "Qwen3-VL-2B-Instruct", 1792, _QWEN_LIMITS),
    ("qwen3vl_4b", "Qwen3-VL-4B-Instruct", 1792, _QWEN_LIMITS),
    ("qwen3vl_8b", "Qwen3-VL-8B-Instruct", 1792, _QWEN_LIMITS),
    ("qwen25vl_7b", "Qwen2.5-VL-7B-Instruct", 2176, _QWEN_LIMITS),
    # 196 tokens of each frame.
    ("onevision_7b", "llava-onevision-qwen2-7b-ov-hf", 3200, dict(max_frames=16)),
    # 64 tokens of each frame, and its time.
    (
      "smolvlm2_500m",
      "SmolVLM2-500M-Video-Instruct",
      2688,
      dict(fps=1.0, max_frames=32),
    ),
  )
}
DERIVED = {
  # The Qwen3-VL that the package ships. Its videos have more tokens: those of places,
  # and the time of each two frames.
  "tiny_qwen3vl": Derived(
    "tiny",
    88,
    dict(path="builtin:tiny_qwen3vl", template="chat_template"),
    {
      "data": dict(prompt_len=128),
      "sft": dict(pack_len=512),
      "label": dict(caption_prompt_len=72),
      "evaluate": dict(prompt_len=232, judge_prompt_len=848),
    },
  ),
  **PUBLISHED,
}


def derive_preset(
  presets: Mapping[str, Callable[[], ConfigDict]], preset: str
) -> ConfigDict:
  """Returns the config of a key of DERIVED from a recipe's own presets."""
  base, more, model, sections = DERIVED[preset]
  config = presets[base]()
  config.model.update(model)
  lengthen_prompts(config, more)
  for name in sections.keys() & config.keys():
    config[name].update(sections[name])
  return config


def lengthen_prompts(section: ConfigDict, longer: int) -> None:
  """Adds the tokens of a longer video to the lengths of all prompts of a config."""
  for key, value in section.items():
    if isinstance(value, ConfigDict):
      lengthen_prompts(value, longer)
    elif key.endswith("prompt_len") and value:
      section[key] = value + longer
