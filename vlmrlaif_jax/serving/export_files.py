"""Writes the files next to exported weights, so that others prompt as the policy does.

`write_files` is the main function: tokenizer, chat template, processor, and the tokens
that end an answer.
"""

import json
import pathlib
import shutil

import tokenizers
from transformers import PreTrainedTokenizerBase

from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import read_json, replace_text, write_json
from vlmrlaif_jax.data import stop_tokens, templates, tokenization
from vlmrlaif_jax.data.processors.interface import Processor
from vlmrlaif_jax.huggingface import checkpoint_folders, families
from vlmrlaif_jax.huggingface.checkpoint_layouts import HfConfig
from vlmrlaif_jax.models import clip
from vlmrlaif_jax.serving import chat_template
from vlmrlaif_jax.serving.chat_template import IMAGE_MARK

# Files of a base whose content can be part of an export.
READ_FILES = (
  "config.json",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "generation_config.json",
  "preprocessor_config.json",
  "video_preprocessor_config.json",
  "processor_config.json",
  "chat_template.jinja",
  "chat_template.json",
)
OWN_TEMPLATE = "chat_template"  # Template of prompts that a base has itself.


def check_links(source: pathlib.Path) -> None:
  """Checks that the small files of a checkpoint are files of its own.

  A checkpoint of others may contain links to any file of the host, which would be
  published with the export. Links inside a cache of the Hub stay inside its model.

  Raises:
    UserError: A file is a link out of the folder, or no regular file.
  """
  is_cached = source.parent.name == "snapshots"
  root = (source.parents[1] if is_cached else source).resolve()
  for name in READ_FILES:
    path = source / name
    if not (path.is_symlink() or path.exists()):
      continue
    target = path.resolve()
    if not target.is_relative_to(root):
      raise UserError(
        f"{path} is a link to {target}, outside of the checkpoint, so it is not "
        "exported. Replace it by the file that it should be."
      )
    if not target.is_file():
      raise UserError(f"{path} is no regular file. Replace it, or remove it.")


def write_files(
  folder: pathlib.Path,
  source: pathlib.Path,
  config: HfConfig,
  *,
  template: str,
  frames: int,
) -> HfConfig:
  """Writes the tokenizer, the chat template and the configs of a policy.

  Args:
    folder: Output folder.
    source: Folder of the base.
    config: Config of the base from convert.load_checkpoint.
    template: Name of the conversation template.
    frames: Frames per video.

  Returns:
    The config with the id of the image token.

  Raises:
    UserError: The files of the base cannot be exported; see `check_links` and
      `chat_template.write_chat_template`.
  """
  settings = checkpoint_folders.find_generation_folder(source)
  source = checkpoint_folders.find_tokenizer_folder(source)
  tokenizer = tokenization.load_tokenizer(source)
  own = tokenization.get_template(template)
  check_links(source)
  exported = _write_tokenizer(folder, tokenizer, own)
  text = chat_template.write_chat_template(exported, tokenizer, own)
  replace_text(folder / "chat_template.jinja", text)
  image = exported.get_vocab()[IMAGE_MARK]
  stops = stop_tokens.read_stops(settings, tokenizer, own)
  rows = max(config["text_config"]["vocab_size"], image + 1)
  generation = {
    "bos_token_id": tokenizer.bos_token_id,
    "eos_token_id": list(stops),
    "pad_token_id": tokenizer.pad_token_id,
    "do_sample": False,
    # Ids that the policy cannot sample.
    "suppress_tokens": [*range(stop_tokens.count_sampled_ids(tokenizer, stops), rows)],
  }
  write_json(folder / "generation_config.json", generation)
  vision = config["vision_config"]
  write_json(folder / "preprocessor_config.json", _make_image_processor(config))
  processor = {
    "processor_class": "LlavaProcessor",
    "image_token": IMAGE_MARK,
    "patch_size": vision["patch_size"],
    "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    # CLIP's class token, which the "default" strategy drops.
    "num_additional_image_tokens": int(vision["model_type"] == "clip_vision_model"),
    "num_frames": frames,  # Read by launch/chat.py.
  }
  write_json(folder / "processor_config.json", processor)
  return {**config, "image_token_index": image}


def copy_files(folder: pathlib.Path, source: pathlib.Path, template: str) -> None:
  """Copies the tokenizer and the processor of a base whose prompts a policy has.

  Args:
    folder: Output folder.
    source: Folder of the base.
    template: Name of the policy's template.

  Raises:
    UserError: The policy has other prompts than the base, or a file is a link out of
      the folder.
  """
  if template != OWN_TEMPLATE:
    raise UserError(
      f"model.template was {template!r} in training, but only a LLaVA is exported with "
      "another template than that of its base. Train with "
      f"--config.model.template={OWN_TEMPLATE}."
    )
  check_links(source)
  for name in READ_FILES:
    if name != "config.json" and (source / name).exists():
      shutil.copyfile(source / name, folder / name)


def write_limits(
  folder: pathlib.Path, source: pathlib.Path, processor: Processor
) -> None:
  """Writes the configs of the processors of a base, with other limits of videos.

  Args:
    folder: Output folder, to which the files of the base are copied.
    source: Folder of the base.
    processor: Processor of the base, with the limits.
  """
  path = folder / families.JOINT_CONFIG
  joint = read_json(path, default={})
  configs = families.read_processor_configs(
    checkpoint_folders.find_processor_folder(source)
  )
  for kind, config, limits in zip(
    families.PROCESSOR_CONFIGS, configs, processor.write_limits(), strict=True
  ):
    limited = {k: x for k, x in {**config, **limits}.items() if x is not None}
    if kind in joint:
      joint[kind] = limited
    else:
      write_json(folder / families.PROCESSOR_CONFIGS[kind], limited)
  if joint:
    write_json(path, joint)


def _write_tokenizer(
  folder: pathlib.Path,
  tokenizer: PreTrainedTokenizerBase,
  template: templates.Template,
) -> PreTrainedTokenizerBase:
  """Writes a tokenizer with IMAGE_MARK, and returns it as transformers reads it.

  Files of the base are not copied: transformers would build another tokenizer from them
  by the `model_type` next to them. The class that is written is read as it is.
  """
  spec = json.loads(tokenizer.backend_tokenizer.to_str())
  special = templates.get_special_tokens(tokenizer)
  # Byte tokens that are marked as special would be missing in decoded texts.
  spec["added_tokens"] = [
    token
    for token in spec["added_tokens"]
    if token["content"] in special or not token["special"]
  ]
  prompt = tokenization.encode_conversation(tokenizer, template, [("", None)])
  if tokenizer("").input_ids and prompt.ids[:1] != [tokenizer.bos_token_id]:
    spec["post_processor"] = None  # A processor would add what the prompts do not have.
  backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
  if IMAGE_MARK not in special:
    backend.add_special_tokens([IMAGE_MARK])
  backend.save(str(folder / "tokenizer.json"))
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": tokenizer.bos_token,
    "eos_token": tokenizer.eos_token,
    "unk_token": tokenizer.unk_token,
    "pad_token": tokenizer.pad_token,
    "additional_special_tokens": sorted({*special, IMAGE_MARK}),
    "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
    "model_max_length": tokenizer.model_max_length,
    "padding_side": "left",
  }
  write_json(folder / "tokenizer_config.json", settings)
  return tokenization.load_tokenizer(folder)


def _make_image_processor(config: HfConfig) -> dict:
  """Returns the preprocessing of frames, for images.

  The image is padded to a square with the mean color and then resized.
  """
  vision, half = config["vision_config"], [0.5] * 3
  side = {"height": vision["image_size"], "width": vision["image_size"]}
  is_clip = vision["model_type"] == "clip_vision_model"
  return {
    "image_processor_type": "LlavaImageProcessor",
    "do_pad": True,
    "do_resize": True,
    "size": side,
    "resample": 3,  # Bicubic.
    "do_center_crop": False,
    "crop_size": side,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": config.get("image_mean") or (list(clip.MEAN) if is_clip else half),
    "image_std": config.get("image_std") or (list(clip.STD) if is_clip else half),
    "do_convert_rgb": True,
  }
