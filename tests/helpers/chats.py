"""A workdir and clips to talk about, for the tests of the chat."""

import json
import shutil
import subprocess
import sys

import av
import jax
import numpy as np

from tests.helpers import several, stage_runs
from tests.methods.roles import noisy
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.serving import chat_session


def workdir(one, folder):
  """A workdir with the policies "sft" and "grpo", and a reward model."""
  for part in ("sft_long", "rm"):
    shutil.copytree(one.workdir / part, folder / part)
  here = one._replace(workdir=folder)
  lora = stage_runs.untrained_lora(here)
  stage_runs.save(here, "grpo", {"policy": noisy(lora, 3, 0.1)})
  text = one.config.to_json_best_effort()
  (folder / "config.json").write_text(json.dumps(json.loads(text)))
  return folder


def mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


def opened(one, folder):
  """The chat with that workdir."""
  told = dict(max_prompt=256, note=lambda line: None)
  return chat_session.open_chat_workdir(str(workdir(one, folder)), mesh(), **told)


def open_model(folder, note=lambda line: None, **settings):
  """The chat with a checkpoint."""
  model = run_lib.default_config()
  model.update(
    template="", prompts="brief", frames=8, clip_frames=8, lora_rank=0, lora_alpha=1.0
  )
  model.update(settings)
  return chat_session.open_model(str(folder), model, mesh(), max_prompt=4096, note=note)


def run_command(folder, files, question, *flags, max_new=64):
  """The greedy answer that launch/chat.py prints about clips and images."""
  process = subprocess.run(
    [sys.executable, "launch/chat.py", f"--model={folder}",
     *(f"--video={file}" for file in files), f"--prompt={question}", "--temperature=0",
     f"--max_tokens={max_new}", "--dtype=float32", *flags],
    cwd=several.ROOT, env=several.environment(), capture_output=True,
  )  # fmt: skip
  assert process.returncode == 0, process.stderr[-3000:]
  # Decoded here, because text=True replaces carriage returns.
  return process.stdout.decode().strip().removeprefix(f"{folder.name}:").strip()


def write_clip(path, seconds=1):
  """A clip of noise, ten frames a second."""
  rng = np.random.default_rng(0)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=10)
    stream.width = stream.height = 64
    for _ in range(round(10 * seconds)):
      pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode())
  return path


def write_squares(path, count, rate, height, width):
  """A clip of `count` frames of colored squares, which a codec changes little."""
  rng = np.random.default_rng(count)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("mpeg4", rate=rate)
    stream.width, stream.height = width, height
    for _ in range(count):
      pixels = rng.integers(0, 256, (6, 6, 3), np.uint8).repeat(20, 0).repeat(20, 1)
      frame = av.VideoFrame.from_ndarray(pixels[:height, :width], format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_sound(path):
  """A file of sound alone."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("aac", rate=8000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    frame.sample_rate = 8000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path
