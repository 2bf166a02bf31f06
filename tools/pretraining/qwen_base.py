"""The base model in Qwen3-VL's layout: tokens of places, and the time of each."""

import functools
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict
from transformers import Qwen3VLConfig

from tools.pretraining import mix, qwen_method, qwen_tokenizer, warm_start
from tools.pretraining.base import PHASES, Base, Family, World, sample_rows
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.types import Batch, MethodModels, Params
from vlmrlaif_jax.data import tokenization, video
from vlmrlaif_jax.data.processors.interface import Grid, Visual, lay_out
from vlmrlaif_jax.data.processors.qwen3_vl import FRAMES, Qwen3VLProcessor
from vlmrlaif_jax.data.world.scene import FPS, SCENE_FRAMES
from vlmrlaif_jax.huggingface import checkpoint_layouts, convert
from vlmrlaif_jax.huggingface.config_keys import HfConfig
from vlmrlaif_jax.models import qwen3_vl, vlm
from vlmrlaif_jax.models.decoders import qwen3
from vlmrlaif_jax.runtime import run as run_lib

# The model reads the digits of all times, because this share of rows has the times of a
# slower or faster clip, by a factor of at most MAX_FACTOR.
OTHER_RATES = 0.3
MAX_FACTOR = 3.0


def make_processor(config: ConfigDict) -> Qwen3VLProcessor:
  """Returns the processor of a config, by which clips of the world become squares."""
  side, vision = config.model.video.side, config.model.vision
  # The limits are a little above the squares, because sizes are rounded down.
  most = int(1.02 * side**2)
  return Qwen3VLProcessor(
    patch=vision.patch,
    merge=vision.merge,
    fps=config.model.video.fps,
    min_frames=config.model.video.min_frames,
    max_frames=config.model.video.max_frames,
    min_pixels=most // 2,
    max_pixels=most * config.model.video.max_frames,
    min_image_pixels=most // 2,
    max_image_pixels=most,
  )


def make_reading(config: ConfigDict) -> video.Reading:
  """Returns the settings for reading the processor's frames as squares."""
  return video.Reading(make_processor(config), square=config.model.video.side)


def make_base(
  config: ConfigDict, tok: tokenization.PreTrainedTokenizerBase, world: World
) -> Base:
  """Returns the base model of a config."""
  model = make_model(config.model, len(tok))
  tokens = np.ones((1, 1), int)
  features = np.zeros((1, 1, *model.vision.feature_shape), np.float32)
  example = Batch(features, tokens, tokens > 0, tokens > 0, tokens[..., None])
  params = jax.jit(model.init)(jax.random.key(config.seed), example)["params"]
  if config.model.start:
    folder = run_lib.resolve_checkpoint(config.model.start)
    old = convert.load_checkpoint(folder, dtype="float32")[1]["params"]
    params = warm_start.start(
      params, old, tok, tokenization.load_tokenizer(folder), world.frames[:100, 0]
    )
  processor = make_processor(config)
  side = config.model.video.side // config.model.vision.patch
  return Base(
    qwen_method.make(MethodModels(policy=model), (side, side)),
    params,
    {},
    functools.partial(make_batch, config, tok, processor, world),
    functools.partial(export, model, processor, tok),
  )


def make_model(config: ConfigDict, vocab: int) -> vlm.VLM:
  """Returns the model of the section `model`."""
  llm = qwen3.Model(vocab=vocab, mrope_interleaved=True, **config.llm)
  tower = qwen3_vl.Model(out=llm.embed, **config.vision)
  return vlm.VLM(tower, qwen3_vl.Connector(llm.embed), llm)


def make_batch(
  config: ConfigDict,
  tok: tokenization.PreTrainedTokenizerBase,
  processor: Qwen3VLProcessor,
  world: World,
  phase: ConfigDict,
  step: int,
) -> qwen_method.QwenBatch:
  """Returns the rows of a step, a pure function of the seed, the phase and the step."""
  rng, rows = sample_rows(config, phase, step)
  side = config.model.video.side // config.model.vision.patch
  count = world.frames.shape[1]
  # Frames of the last third are not drawn, because all objects may have vanished there.
  frame = rng.integers(count * 2 // 3, size=len(rows)).tolist()
  third = rng.integers(len(mix.THIRDS), size=len(rows)).tolist()
  scenes = [world.scenes[i] for i in rows]
  pack = functools.partial(mix.pack, tok, qwen_tokenizer.TEMPLATE, length=phase.length)
  if phase.name == PHASES[0]:
    grid = Grid(1, side, side)
    at = _list_frames(processor)
    pixels = [world.frames[i, t : t + 1] for i, t in zip(rows, frame, strict=True)]
    packed = pack(
      [
        mix.make_image_tasks(s, int(at[t]), rng)
        for s, t in zip(scenes, frame, strict=True)
      ],
      videos=[lay_out(processor, Visual(grid))] * len(rows),
    )
  else:
    grid = Grid(count // FRAMES, side, side)
    pixels = [world.frames[i] for i in rows]
    videos = [Visual(grid, _sample_times(processor, rng)) for _ in rows]
    packed = pack(
      [mix.make_tasks(s, rng, judging=phase.name == PHASES[2]) for s in scenes],
      videos=[lay_out(processor, v) for v in videos],
      clips=[mix.make_clip_task(s, t) for s, t in zip(scenes, third, strict=True)],
      clip_videos=[
        lay_out(processor, _select_third(v, t))
        for v, t in zip(videos, third, strict=True)
      ],
    )
  patches = np.stack([processor.process(x, grid).pixels for x in pixels])
  patches = patches.reshape(len(rows), grid.time, side**2, -1)
  return qwen_method.QwenBatch(patches, np.array(third, np.int32), **packed._asdict())


def _list_frames(processor: Qwen3VLProcessor) -> np.ndarray:
  """Returns the frames of a scene that the processor reads."""
  return processor.sample_frames(SCENE_FRAMES, float(FPS))


def _select_third(visual: Visual, third: int) -> Visual:
  length = visual.grid.time // len(mix.THIRDS)
  return visual.select(third * length, (third + 1) * length)


def _sample_times(
  processor: Qwen3VLProcessor, rng: np.random.Generator
) -> tuple[float, ...]:
  """Returns the times of frames, of a clip as it is or of a slower or faster one."""
  factor = 1.0
  if rng.random() < OTHER_RATES:
    factor = np.exp(rng.uniform(-1, 1) * np.log(MAX_FACTOR))
  return tuple((_list_frames(processor) / FPS * factor).round(6).tolist())


def make_config(model: vlm.VLM, tok: tokenization.PreTrainedTokenizerBase) -> HfConfig:
  """Returns the config.json of the model."""
  llm = model.llm
  text = checkpoint_layouts.write_fields(qwen3.CONFIG, llm)
  text["rope_parameters"] |= {
    "rope_type": "default",
    "mrope_section": list(llm.mrope),
    "mrope_interleaved": True,
  }
  text["max_position_embeddings"] = 4096
  text |= {"eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
  names = ("IMAGE", "VIDEO", "VISION_START", "VISION_END")
  tokens = [getattr(qwen_tokenizer, name) for name in names]
  image, clip, start, end = tok.convert_tokens_to_ids(tokens)
  config = Qwen3VLConfig(
    text_config=text,
    vision_config=checkpoint_layouts.write_fields(qwen3_vl.CONFIG, model.vision),
    tie_word_embeddings=llm.tied,
    image_token_id=image,
    video_token_id=clip,
    vision_start_token_id=start,
    vision_end_token_id=end,
  )
  return {
    **config.to_diff_dict(),
    "architectures": ["Qwen3VLForConditionalGeneration"],
  }


def export(
  model: vlm.VLM,
  processor: Qwen3VLProcessor,
  tok: tokenization.PreTrainedTokenizerBase,
  folder: pathlib.Path,
  params: Params,
) -> None:
  """Writes the model and the settings of its processor next to its tokenizer."""
  convert.save_checkpoint(folder, params, make_config(model, tok))
  stops = tok.convert_tokens_to_ids([qwen_tokenizer.END, qwen_tokenizer.PAD])
  write_json(
    folder / "generation_config.json",
    {"eos_token_id": stops, "pad_token_id": stops[1]},
  )
  for name, settings in make_processor_configs(processor).items():
    write_json(folder / name, settings)


def make_processor_configs(processor: Qwen3VLProcessor) -> dict[str, HfConfig]:
  """Returns the Hugging Face configs of the processor by the names of their files."""
  shared = {
    "processor_class": "Qwen3VLProcessor",
    "patch_size": processor.patch,
    "merge_size": processor.merge,
    "temporal_patch_size": FRAMES,
    "image_mean": list(processor.mean),
    "image_std": list(processor.std),
  }
  size = lambda least, most: {"size": {"shortest_edge": least, "longest_edge": most}}
  image = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    **shared,
    **size(processor.min_image_pixels, processor.max_image_pixels),
  }
  clip = {
    "video_processor_type": "Qwen3VLVideoProcessor",
    **shared,
    **size(processor.min_pixels, processor.max_pixels),
    "fps": processor.fps,
    "min_frames": processor.min_frames,
    "max_frames": processor.max_frames,
  }
  return {"preprocessor_config.json": image, "video_preprocessor_config.json": clip}


FAMILY = Family(qwen_tokenizer.train, make_reading, make_base)
