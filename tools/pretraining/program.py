"""Trains the small base model of the embedded world, and exports it."""

import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from tools.pretraining import llava_base, qwen_base, tokenizer
from tools.pretraining.base import PHASES, Base, World
from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import open_replacing
from vlmrlaif_jax.core.interrupts import StageMonitor
from vlmrlaif_jax.core.profiling import ProfilerTrace
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import tokenization, video
from vlmrlaif_jax.data.world import builder, scene
from vlmrlaif_jax.recipes import validation, workdir_lock
from vlmrlaif_jax.stages.stage import write_facts
from vlmrlaif_jax.training import alarms, checkpoint, loop
from vlmrlaif_jax.training.job import TrainingJob, TrainingSchedule

FAMILIES = {"llava": llava_base.FAMILY, "qwen3_vl": qwen_base.FAMILY}
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
  on_taken: Callable[[UserError], None] = lambda error: None,
) -> None:
  """Renders the world, trains tokenizer and model, and exports both to workdir/export.

  Args:
    config: See configs/pretrain.py.
    workdir: Folder of the run.
    stop: Returns whether to stop; called between steps.
    traced: Steps of each phase that are profiled.
    on_taken: See hold_workdir.

  Raises:
    HostError: There are several processes.
  """
  if distributed.is_multiprocess():
    raise distributed.HostError(
      "the recipe pretrain runs on one device: start one process, without --processes"
    )
  root = pathlib.Path(workdir)
  validation.check_workdir_path(root.absolute())
  with workdir_lock.hold_workdir(root, on_taken=on_taken):
    _run_locked(config, root, stop, traced)


def _run_locked(
  config: ConfigDict, root: pathlib.Path, stop: Callable[[], bool], traced: range
) -> None:
  """Runs the program in a locked workdir; see run."""
  family = FAMILIES[config.model.family]
  folder = root / "export" / config.model.family
  tok = _load_tokenizer(config, family.train_tokenizer, folder)
  world = load_world(config, family.make_reading(config), root / "world")
  base = family.make_base(config, tok, world)
  for name, title in zip(PHASES, TITLES, strict=True):
    write_facts(root / name, title)
    phase = ConfigDict({**config[name], "name": name})
    with ProfilerTrace(traced, str(root / name / "trace"), print) as trace:
      watch = StageMonitor(stop, trace.step)
      params = _train(config, phase, root / name, base, watch)
    base = base._replace(params=params)
  base.export(folder, base.params)


def _train(
  config: ConfigDict,
  phase: ConfigDict,
  folder: pathlib.Path,
  base: Base,
  watch: StageMonitor,
) -> Params:
  """Trains one phase, from its latest checkpoint if there is one."""
  step = checkpoint.get_latest_step(f"{folder}/checkpoints")
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with StageLog(folder, phase.name, phase.steps, resume_from=step) as log:
    job = TrainingJob(
      method=base.method,
      params=base.params,
      frozen=base.frozen,
      batch_spec=None,  # Only the planner reads it, and this job is not planned.
      schedule=TrainingSchedule(phase.steps, config.save_every, config.log_every),
      optimizer=phase.optimizer,
      passes={},
      alarms=alarms.default_config(),
      data=lambda step: base.make_batch(phase, step),
    )
    state = loop.fit_job(
      job,
      key=jax.random.key(config.seed),
      place=lambda tree: jax.tree.map(lambda _: here, tree),
      log=log,
      watch=watch,
    )
  return state.params


def _load_tokenizer(config: ConfigDict, train: Callable, folder: pathlib.Path):
  if not (folder / "tokenizer.json").exists():
    folder.mkdir(parents=True, exist_ok=True)
    texts = tokenizer.generate_texts(config.seed, scenes=3000)
    train(texts, config.model.vocab).save_pretrained(str(folder))
  return tokenization.load_tokenizer(folder)


def load_world(
  config: ConfigDict, reading: video.Reading, folder: pathlib.Path
) -> World:
  """Returns the scenes of the pretraining split and their frames, cached in a file."""
  builder.build_world(folder, sizes={"pretrain": config.videos}, seed=config.seed)
  records = builder.read_split(folder, "pretrain")
  scenes = [scene.scene_from_json(r["truth"]["scene"]) for r in records]
  cached = folder / "frames.npy"
  if not cached.exists():
    loaded = video.read_videos(
      [folder / "videos" / r["video"] for r in records],
      reading,
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
  return World(scenes, np.load(cached))
