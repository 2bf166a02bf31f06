"""The base model in LLaVA-1.5's layout: CLIP's towers, a projector and a LLaMA."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tools.pretraining import convert_clip, method, mix, scene_texts, tokenizer
from tools.pretraining.base import PHASES, Base, Family, World, sample_rows
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.types import Batch, MethodModels, Params, merge_params
from vlmrlaif_jax.data import tokenization, video
from vlmrlaif_jax.data.processors.llava import count_pooled_tokens, lay_out_features
from vlmrlaif_jax.data.world import scene
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.models import clip, clip_text, projector, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.runtime import run as run_lib

TEMPLATE = tokenization.CONVERSATION_TEMPLATES["brief"]


def make_reading(config: ConfigDict) -> video.Reading:
  """Returns the settings for reading evenly spaced squares."""
  return video.Reading(video.ByCount(config.frames), square=config.model.vision.image)


def make_base(
  config: ConfigDict, tok: tokenization.PreTrainedTokenizerBase, world: World
) -> Base:
  """Returns the base model of a config, with CLIP's towers if it names a checkpoint."""
  model, both = make_models(config.model, len(tok))
  params = init_params(model, both, jax.random.key(config.seed), config.model)
  frozen = {}
  if config.model.towers:
    frozen = load_towers(run_lib.resolve_checkpoint(config.model.towers), params)
    params = {"vlm": {k: v for k, v in params["vlm"].items() if k != "vision"}}

  def save(folder, params):
    export(folder, model, both, merge_params(frozen, params), tok)

  return Base(
    method.make(method.default_config(), MethodModels(policy=model, critic=both)),
    params,
    frozen,
    functools.partial(make_batch, config, tok, world),
    save,
  )


def make_models(config: ConfigDict, vocab: int) -> tuple[vlm.VLM, convert_clip.CLIP]:
  """Returns the VLM and the CLIP with the same vision tower."""
  tower = clip.VisionTower(**config.vision)
  model = vlm.VLM(
    tower, projector.Projector(config.llm.embed), llama.Model(vocab=vocab, **config.llm)
  )
  words = clip_text.TextTower(vocab=vocab, **config.text)
  return model, convert_clip.CLIP(tower, words, config.features)


def init_params(
  model: vlm.VLM, both: convert_clip.CLIP, key: jax.Array, config: ConfigDict
) -> Params:
  """Returns random weights: {"vlm": ..., "clip": CLIP without its vision tower}."""
  side = config.vision.image
  video, ones = jnp.zeros((1, 2, side, side, 3), jnp.uint8), jnp.ones((1, 4), int)
  example = Batch(video, ones, ones > 0, ones > 0, ones[..., None])
  words = jnp.ones((1, config.text.context), int)
  whole = jax.jit(model.init)(key, example)["params"]
  other = jax.jit(both.init)(
    jax.random.fold_in(key, 1), example.video[:, 0], words, words > 0
  )["params"]
  return {"vlm": whole, "clip": {k: v for k, v in other.items() if k != "vision"}}


def load_towers(folder: pathlib.Path, params: Params) -> Params:
  """Loads the CLIP of a base model that `export` wrote.

  Args:
    folder: Folder of the base model.
    params: Parameters whose sizes the CLIP must have.

  Returns:
    {"vlm": the vision tower, "clip": CLIP's other parameters}.

  Raises:
    ValueError: The CLIP has other sizes.
  """
  _, read, _ = convert.load_checkpoint(folder, dtype="float32")
  _, read_clip, _ = convert_clip.load(folder / "clip")
  loaded = {
    "vlm": {"vision": read["params"]["vision"]},
    "clip": {k: v for k, v in read_clip.items() if k != "vision"},
  }
  required = {"vlm": {"vision": params["vlm"]["vision"]}, "clip": params["clip"]}
  sizes = lambda tree: jax.tree.map(jnp.shape, tree)
  if sizes(loaded) != sizes(required):
    raise ValueError(
      f"--config.model.towers={folder} has a CLIP of other sizes than model.vision, "
      "model.text and model.features: set these three to the sizes of that CLIP"
    )
  return loaded


def make_batch(
  config: ConfigDict,
  tok: tokenization.PreTrainedTokenizerBase,
  world: World,
  phase: ConfigDict,
  step: int,
) -> method.PretrainBatch:
  """Returns the rows of a step, a pure function of the seed, the phase and the step."""
  rng, rows = sample_rows(config, phase, step)
  count = world.frames.shape[1]
  # Frames of the last third are not drawn, because all objects may have vanished there.
  frame = rng.integers(count * 2 // 3, size=len(rows)).astype(np.int32)
  third = rng.integers(len(mix.THIRDS), size=len(rows)).astype(np.int32)
  scene_frames = [
    int(t) for t in video.sample_frame_indices(scene.SCENE_FRAMES, count)[frame]
  ]
  chosen = [world.scenes[i] for i in rows]
  patches = (config.model.vision.image // config.model.vision.patch) ** 2
  pack = functools.partial(mix.pack, tok, TEMPLATE, length=phase.length)
  repeat = lambda tokens: [lay_out_features(tokens)] * len(rows)
  pixels = world.frames[rows]
  if phase.name == PHASES[0]:
    tasks = [
      mix.make_image_tasks(s, t, rng) for s, t in zip(chosen, scene_frames, strict=True)
    ]
    packed = pack(tasks, videos=repeat(patches))
    pixels, frame = pixels[np.arange(len(rows)), frame][:, None], np.zeros_like(frame)
  else:
    packed = pack(
      [mix.make_tasks(s, rng, judging=phase.name == PHASES[2]) for s in chosen],
      videos=repeat(count_pooled_tokens(count, patches)),
      clips=[mix.make_clip_task(s, int(t)) for s, t in zip(chosen, third, strict=True)],
      clip_videos=repeat(count_pooled_tokens(count // 3, patches)),
    )
  captions = [
    scene_texts.make_caption(s, t) for s, t in zip(chosen, scene_frames, strict=True)
  ]
  caption, caption_mask = encode_captions(tok, captions, config.model.text.context)
  return method.PretrainBatch(
    video=pixels,
    third=third,
    frame=frame,
    caption=caption,
    caption_mask=caption_mask,
    **packed._asdict(),
  )


def encode_captions(
  tok, captions: list[str], context: int
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes captions for CLIP's text tower, with an end token and padding.

  Returns:
    (ids, mask of real tokens), each of shape (captions, context).
  """
  end = tok.convert_tokens_to_ids(tokenizer.END_OF_CAPTION)
  ids = np.full((len(captions), context), tok.pad_token_id, np.int32)
  mask = np.zeros(ids.shape, bool)
  for i, caption in enumerate(captions):
    row = [tok.bos_token_id, *tokenization.encode_suffix(tok, f" {caption}")][
      : context - 1
    ] + [end]
    ids[i, : len(row)], mask[i, : len(row)] = row, True
  return ids, mask


def export(
  folder: pathlib.Path, model: vlm.VLM, both: convert_clip.CLIP, params: Params, tok
) -> None:
  """Writes the model next to its tokenizer, and CLIP into the subfolder "clip"."""
  ids = tok.convert_tokens_to_ids([tokenizer.IMAGE, tokenizer.END_OF_CAPTION])
  convert.save_checkpoint(
    folder, params["vlm"], convert.make_llava_config(model, image_token=ids[0])
  )
  whole = {**params["clip"], "vision": params["vlm"]["vision"]}
  config = convert_clip.make_config(both, end=ids[1])
  convert_clip.save(folder / "clip", whole, config, dtype="float16")
  size = {"height": model.vision.image, "width": model.vision.image}
  write_json(
    folder / "preprocessor_config.json",
    {
      "image_processor_type": "CLIPImageProcessor",
      "do_center_crop": True,
      "crop_size": size,
      "size": {"shortest_edge": model.vision.image},
      "resample": 3,
      "image_mean": list(clip.MEAN),
      "image_std": list(clip.STD),
    },
  )


FAMILY = Family(tokenizer.train, make_reading, make_base)
