"""Trains the small base model of the embedded world, and exports it."""

import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tools.pretraining import convert_clip, method, mix, scene_texts, tokenizer
from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.files import open_replacing, write_json
from vlmrlaif_jax.core.interrupts import StageMonitor
from vlmrlaif_jax.core.profiling import ProfilerTrace
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Batch, MethodModels, Params, merge_params
from vlmrlaif_jax.data import tokenization, video
from vlmrlaif_jax.data.processors.llava import count_pooled_tokens
from vlmrlaif_jax.data.world import builder, scene
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.models import clip, projector, vlm
from vlmrlaif_jax.models.decoders import llama
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.stages.stage import write_facts
from vlmrlaif_jax.training import alarms, checkpoint, loop
from vlmrlaif_jax.training.job import TrainingJob, TrainingSchedule

PHASES = ("pretrain_image", "pretrain_see", "pretrain_judge")  # In training order.
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
  """Renders the world, trains tokenizer and model, and exports both to workdir/export.

  Args:
    config: See configs/pretrain.py.
    workdir: Folder of the run.
    stop: Returns whether to stop; called between steps.
    traced: Steps of each phase that are profiled.

  Raises:
    HostError: There are several processes.
  """
  if distributed.is_multiprocess():
    raise distributed.HostError(
      "the recipe pretrain runs on one device: start one process, without --processes"
    )
  root = pathlib.Path(workdir)
  tok = _load_tokenizer(config, root / "export" / "llava")
  scenes, frames = _load_videos(config, root / "world")
  model, both = make_models(config.model, len(tok))
  params = init_params(model, both, jax.random.key(config.seed), config.model)
  frozen = {}
  if config.model.towers:
    frozen = load_towers(run_lib.resolve_checkpoint(config.model.towers), params)
    params = {"vlm": {k: v for k, v in params["vlm"].items() if k != "vision"}}
  pretraining = method.make(
    method.default_config(), MethodModels(policy=model, critic=both)
  )
  for name, title in zip(PHASES, TITLES, strict=True):
    write_facts(root / name, title)
    phase = ConfigDict({**config[name], "name": name})
    data = lambda step, phase=phase: make_batch(
      config, phase, tok, scenes, frames, step
    )
    with ProfilerTrace(traced, str(root / name / "trace"), print) as trace:
      watch = StageMonitor(stop, trace.step)
      params = _train(
        config, phase, root / name, pretraining, params, frozen, data, watch
      )
  export(root / "export" / "llava", model, both, merge_params(frozen, params), tok)


def export(
  folder: pathlib.Path, model: vlm.VLM, both: convert_clip.CLIP, params: Params, tok
) -> None:
  """Writes the model next to its tokenizer, and CLIP into the subfolder "clip"."""
  ids = tok.convert_tokens_to_ids([tokenizer.IMAGE, tokenizer.END_OF_CAPTION])
  convert.save_llava(
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


def _train(config, phase, folder, pretraining, params, frozen, data, watch) -> Params:
  """Trains one phase, from its latest checkpoint if there is one."""
  step = checkpoint.get_latest_step(f"{folder}/checkpoints")
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with StageLog(folder, phase.name, phase.steps, resume_from=step) as log:
    job = TrainingJob(
      method=pretraining,
      params=params,
      frozen=frozen,
      batch_spec=None,  # Only the planner reads it, and this job is not planned.
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


def make_models(config: ConfigDict, vocab: int) -> tuple[vlm.VLM, convert_clip.CLIP]:
  """Returns the VLM and the CLIP with the same vision tower."""
  tower = clip.VisionTower(**config.vision)
  model = vlm.VLM(
    tower, projector.Projector(config.llm.embed), llama.Model(vocab=vocab, **config.llm)
  )
  words = clip.TextTower(vocab=vocab, **config.text)
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
  _, read, _ = convert.load_llava(folder, dtype="float32")
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


def make_batch(config, phase, tok, scenes, frames, step: int) -> method.PretrainBatch:
  """Returns the rows of a step, a pure function of the seed, the phase and the step."""
  rng = np.random.default_rng([config.seed, PHASES.index(phase.name), step])
  rows = rng.choice(len(scenes), phase.batch_size, replace=False)
  count = frames.shape[1]
  # Frames of the last third are not drawn, because all objects may have vanished there.
  frame = rng.integers(count * 2 // 3, size=len(rows)).astype(np.int32)
  third = rng.integers(len(mix.THIRDS), size=len(rows)).astype(np.int32)
  scene_frames = [
    int(t) for t in video.sample_frame_indices(scene.SCENE_FRAMES, count)[frame]
  ]
  chosen = [scenes[i] for i in rows]
  patches = (config.model.vision.image // config.model.vision.patch) ** 2
  pixels = frames[rows]
  if phase.name == PHASES[0]:
    tasks = [
      mix.make_image_tasks(s, t, rng) for s, t in zip(chosen, scene_frames, strict=True)
    ]
    packed = mix.pack(tok, tasks, length=phase.length, video_tokens=patches)
    pixels, frame = pixels[np.arange(len(rows)), frame][:, None], np.zeros_like(frame)
  else:
    tasks = [mix.make_tasks(s, rng, judging=phase.name == PHASES[2]) for s in chosen]
    packed = mix.pack(
      tok,
      tasks,
      length=phase.length,
      video_tokens=count_pooled_tokens(count, patches),
      clips=[mix.make_clip_task(s, int(t)) for s, t in zip(chosen, third, strict=True)],
      clip_tokens=count_pooled_tokens(count // 3, patches),
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


def _load_tokenizer(config: ConfigDict, folder: pathlib.Path):
  if not (folder / "tokenizer.json").exists():
    folder.mkdir(parents=True, exist_ok=True)
    texts = tokenizer.generate_texts(config.seed, scenes=3000)
    trained = tokenizer.train(texts, vocab=config.model.vocab)
    trained.save_pretrained(str(folder))
  return tokenization.load_tokenizer(folder)


def _load_videos(config: ConfigDict, folder: pathlib.Path):
  """Returns the scenes of the pretraining split and their frames, cached in a file."""
  builder.build_world(folder, sizes={"pretrain": config.videos}, seed=config.seed)
  records = builder.read_split(folder, "pretrain")
  scenes = [scene.scene_from_json(r["truth"]["scene"]) for r in records]
  cached = folder / "frames.npy"
  if not cached.exists():
    loaded = video.read_videos(
      [folder / "videos" / r["video"] for r in records],
      video.Reading(video.ByCount(config.frames), square=config.model.vision.image),
      workers=os.cpu_count() or 1,
      timeout_s=20.0,
    )
    frames = dict(zip((r["video"] for r in records), loaded, strict=True))
    failures = [(name, x) for name, x in frames.items() if isinstance(x, str)]
    if failures:
      raise RuntimeError(
        f"{len(failures)} videos cannot be decoded, the first are {failures[:5]}"
      )
    with open_replacing(cached) as file:
      np.save(file, np.stack([frames[r["video"]].pixels for r in records]))
  return scenes, np.load(cached)
