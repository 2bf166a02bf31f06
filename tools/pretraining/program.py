"""Trains the small base model of the embedded world, and writes it out."""

import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tools.pretraining import convert_clip, method, mix, sayings, tokenizer
from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.files import open_replacing, write_json
from vlmrlaif_jax.core.interrupts import StageMonitor
from vlmrlaif_jax.core.profiling import ProfilerTrace
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Batch, MethodModels, Params, merge_params
from vlmrlaif_jax.data import tokenization, video
from vlmrlaif_jax.data.world import builder, scene
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.models import clip, llama, projector, vlm
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.stages.stage import write_facts
from vlmrlaif_jax.training import alarms, checkpoint, loop
from vlmrlaif_jax.training.job import TrainingJob, TrainingSchedule

PHASES = ("pretrain_image", "pretrain_see", "pretrain_judge")  # In order.
TITLES = (
  "Pretraining: to see single frames",
  "Pretraining: to see clips",
  "Pretraining: to judge",
)


def run(
  config: ConfigDict,
  workdir: str,
  stop: Callable[[], bool] = lambda: False,
  traced: range = range(0),
) -> None:
  """Renders the world, trains tokenizer and model, exports both to workdir/export.

  Args:
    config: see configs/pretrain.py.
    workdir: folder of the run.
    stop: whether to end now; called between steps.
    traced: steps of each phase that a trace is written of.

  Raises:
    HostError: there are several processes, where one device is enough.
  """
  if distributed.is_multiprocess():
    raise distributed.HostError("pretrain runs on one device: start one process alone")
  root = pathlib.Path(workdir)
  tok = _tokenizer(config, root / "export" / "llava")
  scenes, frames = _videos(config, root / "world")
  model, both = models(config.model, len(tok))
  params = init(model, both, jax.random.key(config.seed), config.model)
  frozen = {}
  if config.model.towers:
    frozen = towers(run_lib.resolve_checkpoint(config.model.towers), params)
    params = {"vlm": {k: v for k, v in params["vlm"].items() if k != "vision"}}
  made = method.make(method.default_config(), MethodModels(policy=model, critic=both))
  for name, title in zip(PHASES, TITLES, strict=True):
    write_facts(root / name, title)
    phase = ConfigDict({**config[name], "name": name})
    data = lambda step, phase=phase: batch(config, phase, tok, scenes, frames, step)
    with ProfilerTrace(traced, str(root / name / "trace"), print) as trace:
      watch = StageMonitor(stop, trace.step)
      params = _train(config, phase, root / name, made, params, frozen, data, watch)
  export(root / "export" / "llava", model, both, merge_params(frozen, params), tok)


def export(
  folder: pathlib.Path, model: vlm.VLM, both: convert_clip.CLIP, params: Params, tok
) -> None:
  """Writes the model beside its tokenizer, and CLIP in a folder of its own below."""
  ids = tok.convert_tokens_to_ids([tokenizer.IMAGE, tokenizer.END_OF_CAPTION])
  convert.save_llava(
    folder, params["vlm"], convert.make_llava_config(model, image_token=ids[0])
  )
  whole = {**params["clip"], "vision": params["vlm"]["vision"]}
  config = convert_clip.config_of(both, end=ids[1])
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


def _train(config, phase, folder, made, params, frozen, data, watch) -> Params:
  """One phase, from where it was killed, if it was."""
  step = checkpoint.get_latest_step(f"{folder}/checkpoints")
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with StageLog(folder, phase.name, phase.steps, resume_from=step) as log:
    job = TrainingJob(
      method=made,
      params=params,
      frozen=frozen,
      batch_spec=None,  # It is never planned.
      schedule=TrainingSchedule(phase.steps, config.save_every, config.log_every),
      optimizer=phase.optimizer,
      passes={},
      alarms=alarms.default_config(),
      data=data,
    )
    state = loop.fit_job(
      job,
      key=jax.random.key(config.seed),
      place=lambda tree: jax.tree.map(lambda _: here, tree),
      log=log,
      watch=watch,
    )
  return state.params


def models(config: ConfigDict, vocab: int) -> tuple[vlm.VLM, convert_clip.CLIP]:
  """The VLM, and the CLIP whose vision tower it shares."""
  tower = clip.VisionTower(**config.vision)
  model = vlm.VLM(
    tower, projector.Projector(config.llm.embed), llama.Model(vocab=vocab, **config.llm)
  )
  words = clip.TextTower(vocab=vocab, **config.text)
  return model, convert_clip.CLIP(tower, words, config.features)


def init(
  model: vlm.VLM, both: convert_clip.CLIP, key: jax.Array, config: ConfigDict
) -> Params:
  """Random weights: {"vlm": ..., "clip": what is CLIP's alone}."""
  side = config.vision.image
  ones = jnp.ones((1, 4), int)
  example = Batch(jnp.zeros((1, 2, side, side, 3), jnp.uint8), ones, ones > 0, ones > 0)
  words = jnp.ones((1, config.text.context), int)
  whole = jax.jit(model.init)(key, example)["params"]
  other = jax.jit(both.init)(
    jax.random.fold_in(key, 1), example.video[:, 0], words, words > 0
  )["params"]
  return {"vlm": whole, "clip": {k: v for k, v in other.items() if k != "vision"}}


def towers(folder: pathlib.Path, params: Params) -> Params:
  """The CLIP of a base that was exported here, in the place of that of `params`.

  Raises:
    ValueError: it is of other sizes.
  """
  _, read, _ = convert.load_llava(folder, dtype="float32")
  _, read_clip, _ = convert_clip.load(folder / "clip")
  found = {
    "vlm": {"vision": read["params"]["vision"]},
    "clip": {k: v for k, v in read_clip.items() if k != "vision"},
  }
  wanted = {"vlm": {"vision": params["vlm"]["vision"]}, "clip": params["clip"]}
  sizes = lambda tree: jax.tree.map(jnp.shape, tree)
  if sizes(found) != sizes(wanted):
    raise ValueError(
      f"model.towers={folder} has a CLIP of other sizes than model.vision, model.text "
      "and model.features say: give its own"
    )
  return found


def batch(config, phase, tok, scenes, frames, step: int) -> method.PretrainBatch:
  """The rows of a step: a pure function of the seed, the phase and the step."""
  rng = np.random.default_rng([config.seed, PHASES.index(phase.name), step])
  rows = rng.choice(len(scenes), phase.batch_size, replace=False)
  count = frames.shape[1]
  # In the last third nothing may be left to see.
  frame = rng.integers(count * 2 // 3, size=len(rows)).astype(np.int32)
  third = rng.integers(len(mix.THIRDS), size=len(rows)).astype(np.int32)
  shown = [int(t) for t in video.sample_frame_indices(scene.SCENE_FRAMES, count)[frame]]
  chosen = [scenes[i] for i in rows]
  patches = (config.model.vision.image // config.model.vision.patch) ** 2
  pixels = frames[rows]
  if phase.name == PHASES[0]:
    told = [mix.image_tasks(s, t, rng) for s, t in zip(chosen, shown, strict=True)]
    packed = mix.pack(tok, told, length=phase.length, video_tokens=patches)
    pixels, frame = pixels[np.arange(len(rows)), frame][:, None], np.zeros_like(frame)
  else:
    told = [mix.tasks(s, rng, judging=phase.name == PHASES[2]) for s in chosen]
    packed = mix.pack(
      tok,
      told,
      length=phase.length,
      video_tokens=projector.count_pooled_tokens(count, patches),
      clips=[mix.clip_task(s, int(t)) for s, t in zip(chosen, third, strict=True)],
      clip_tokens=projector.count_pooled_tokens(count // 3, patches),
    )
  captions = [sayings.caption(s, t) for s, t in zip(chosen, shown, strict=True)]
  caption, caption_mask = caption_ids(tok, captions, config.model.text.context)
  return method.PretrainBatch(
    video=pixels,
    third=third,
    frame=frame,
    caption=caption,
    caption_mask=caption_mask,
    **packed._asdict(),
  )


def caption_ids(
  tok, captions: list[str], context: int
) -> tuple[np.ndarray, np.ndarray]:
  """Captions as CLIP's text tower reads them: an end token, then padding."""
  end = tok.convert_tokens_to_ids(tokenizer.END_OF_CAPTION)
  ids = np.full((len(captions), context), tok.pad_token_id, np.int32)
  mask = np.zeros(ids.shape, bool)
  for i, caption in enumerate(captions):
    row = [tok.bos_token_id, *tokenization.encode_suffix(tok, f" {caption}")][
      : context - 1
    ] + [end]
    ids[i, : len(row)], mask[i, : len(row)] = row, True
  return ids, mask


def _tokenizer(config: ConfigDict, folder: pathlib.Path):
  if not (folder / "tokenizer.json").exists():
    folder.mkdir(parents=True, exist_ok=True)
    texts = tokenizer.corpus(config.seed, scenes=3000)
    made = tokenizer.train(texts, vocab=config.model.vocab)
    made.save_pretrained(str(folder))
  return tokenization.load_tokenizer(folder)


def _videos(config: ConfigDict, folder: pathlib.Path):
  """The scenes of the pretraining split and their frames, decoded once and kept."""
  builder.build_world(folder, sizes={"pretrain": config.videos}, seed=config.seed)
  records = builder.read_split(folder, "pretrain")
  scenes = [scene.scene_from_json(r["truth"]["scene"]) for r in records]
  kept = folder / "frames.npy"
  if not kept.exists():
    loaded = video.load_videos(
      [folder / "videos" / r["video"] for r in records],
      count=config.frames,
      size=config.model.vision.image,
      workers=os.cpu_count() or 1,
      timeout_s=20.0,
    )
    frames = dict(zip((r["video"] for r in records), loaded, strict=True))
    failures = [(name, x) for name, x in frames.items() if isinstance(x, str)]
    if failures:
      raise RuntimeError(f"videos that cannot be read: {failures[:5]}")
    with open_replacing(kept) as file:
      np.save(file, np.stack([frames[r["video"]] for r in records]))
  return scenes, np.load(kept)
