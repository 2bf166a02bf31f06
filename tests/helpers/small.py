"""A checkpoint, a world and settings so small that a test makes them in seconds."""

import json

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import dpo, front, grm, grpo_rank, ppo, rlaif_v
from tests.helpers.rows import text_batch
from tools.pretraining import tokenizer
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.data import pipeline
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.models import clip, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.models.projector import Projector
from vlmrlaif_jax.stages.evaluation import evaluate

VOCAB = 512  # Of the matrices; the tokenizer has a few ids less.
VIDEOS = dict(sft=6, prompts=4, benchmark=2)


def write_checkpoint(folder, seed=0):
  """A LLaVA checkpoint of random weights, with a tokenizer of the world's words."""
  tok = tokenizer.train(tokenizer.generate_texts(0, scenes=60), vocab=VOCAB - 4)
  tok.save_pretrained(folder)
  llm = llama.Model(**{**llama.VARIANTS["tiny"], "vocab": VOCAB})
  model = vlm.VLM(clip.VisionTower(**clip.VARIANTS["tiny"]), Projector(llm.embed), llm)
  side = model.vision.image
  ones = np.ones((1, 2), int)
  batch = text_batch(
    np.zeros((1, 1, side, side, 3), np.uint8), ones, ones > 0, ones > 0
  )
  params = jax.jit(model.init)(jax.random.key(seed), batch)["params"]
  image = tok.convert_tokens_to_ids(tokenizer.IMAGE)
  config = convert.make_llava_config(model, image_token=image)
  convert.save_checkpoint(folder, params, config, dtype="float32")
  return folder


def write_world(folder):
  """Videos, and sft, prompts and benchmark.jsonl beside them, as a user's would be.

  preferences.jsonl prefers what is true to nonsense.
  """
  config = pipeline.default_config()
  config.sizes.update(VIDEOS)
  splits, _ = pipeline.load_splits(config, folder, seed=0)
  pairs = [
    {
      **{key: e[key] for key in ("id", "video", "question", "source")},
      "output_1": e["truth"]["answer"] if i % 2 else "Blue rain.",
      "output_2": "Blue rain." if i % 2 else e["truth"]["answer"],
      "preference": 1 if i % 2 else 2,
    }
    for i, e in enumerate(splits.prompts)
  ]
  jsonl.write_records(folder / "preferences.jsonl", pairs)
  return folder


def settings(checkpoint, world):
  """Of a run over both: what `--config.KEY=VALUE` would be given, by KEY."""
  return {
    "model.path": str(checkpoint),
    "model.frames": 3,
    "model.clip_frames": 2,
    "model.lora_rank": 2,
    "model.sft_lora_rank": 3,
    "data.records": str(world / "sft.jsonl"),
    "data.videos": str(world / "videos"),
    "data.prompts": str(world / "prompts.jsonl"),
    "data.benchmark": str(world / "benchmark.jsonl"),
    "data.workers": 0,
    "data.prompt_len": 64,
    "data.response_len": 48,
    "sft.batch_size": 4,
    "sft.short_steps": 2,
    "sft.long_steps": 2,
    "sft.optimizer.warmup_steps": 0,
    "rm.preferences": str(world / "preferences.jsonl"),
    "rm.batch_size": 4,
    "rm.steps": 2,
    "rm.optimizer.warmup_steps": 0,
    "ppo.batch_size": 4,
    "ppo.steps": 2,
    "ppo.samples_every": 1,
    "ppo.optimizer.warmup_steps": 0,
    "label.batch": 4,
    "evaluate.batch": 4,
  }


def flags(settings):
  """The settings as the launcher takes them."""
  return [f"--config.{key}={value}" for key, value in settings.items()]


def all_sections() -> ConfigDict:
  """The sections of all stages, as the tiny recipes have them."""
  made = ppo.tiny()
  made.grpo = grpo_rank.tiny().grpo
  made.dpo = dpo.tiny().dpo
  made.update({name: grm.tiny()[name] for name in ("grm_sft", "grm", "judges")})
  made.update({name: rlaif_v.tiny()[name] for name in ("rounds", "claims")})
  made.evaluate = front.make_section(
    evaluate.default_config(), judge_prompt_len=768, judge_max_new=32
  )
  return made


def config(
  settings, stages=("sft_short", "sft_long", "rm", "ppo"), **more
) -> ConfigDict:
  """A recipe of these stages. more: settings, with __ for the dots of their keys."""
  made = all_sections()
  made.update(recipe="test", stages=stages)
  more = {key.replace("__", "."): value for key, value in more.items()}
  made.update_from_flattened_dict({**settings, **more})
  return made


def metrics(folder):
  """The lines of a stage's metrics.jsonl, without what a clock said."""
  rows = (folder / "metrics.jsonl").read_text().splitlines()
  return [
    {
      key: value
      for key, value in json.loads(row).items()
      if key not in ("time", "phases")
    }
    for row in rows
  ]
