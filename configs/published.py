"""Presets of published families, which change the preset "7b" of a recipe.

Every recipe has them, for example --config=configs/ppo.py:qwen3vl_4b. The checkpoint is
a folder in Hugging Face's format. The reward model has the same checkpoint, because
videos are encoded once for both.
"""

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
LORA = dict(lora_rank=32, lora_alpha=64.0)
LEARNING_RATES = {
  "sft": 1e-4,
  "rm": 2e-5,
  "ppo": 1e-5,
  "grpo": 1e-5,
  "grm_sft": 2e-5,
  "grm": 1e-5,
  "dpo": 5e-6,
}


class Published(NamedTuple):
  """A published model, and the limits of its videos."""

  name: str  # Repository on the Hub, without its owner.
  video_len: int  # Tokens of the longest video, with its text.
  limits: dict[str, Any]  # Settings of the section `model`.


PUBLISHED = {
  **{
    f"qwen3vl_{size}": Published(
      f"Qwen3-VL-{size.upper()}-Instruct",
      1792,
      dict(fps=2.0, max_frames=32, max_pixels=32 * FRAME_PIXELS),
    )
    for size in ("2b", "4b", "8b")
  },
  "qwen25vl_7b": Published(
    "Qwen2.5-VL-7B-Instruct",
    2176,
    dict(fps=2.0, max_frames=32, max_pixels=32 * FRAME_PIXELS),
  ),
  # 196 tokens of each frame.
  "onevision_7b": Published(
    "llava-onevision-qwen2-7b-ov-hf", 3200, dict(max_frames=16)
  ),
  # 64 tokens of each frame, and its time.
  "smolvlm2_500m": Published(
    "SmolVLM2-500M-Video-Instruct", 2688, dict(fps=1.0, max_frames=32)
  ),
}


def use_published(config: ConfigDict, preset: str) -> ConfigDict:
  """Changes the preset "7b" of a recipe to a published model, a key of PUBLISHED."""
  name, video_len, limits = PUBLISHED[preset]
  path = f"checkpoints/{name}"
  config.model.update(
    path=path,
    reward_model_path="",
    size=preset,
    reward_model_size="",
    template="chat_template",
    clip_frames=12,
    quant="none",
    **limits,
    **LORA,
  )
  lengthen_prompts(config, video_len + TEXT_LEN - LLAVA_LEN)
  for section, rate in LEARNING_RATES.items():
    if section in config:
      config[section].optimizer.learning_rate = rate
  return config


def lengthen_prompts(section: ConfigDict, longer: int) -> None:
  """Adds the tokens of a longer video to the lengths of all prompts of a config."""
  for key, value in section.items():
    if isinstance(value, ConfigDict):
      lengthen_prompts(value, longer)
    elif key.endswith("prompt_len") and value:
      section[key] = value + longer
