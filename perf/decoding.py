"""Measures how long it takes to read 50 frames of a clip of 60 s, and the memory.

  python perf/decoding.py [--before=CHECKOUT] [--readers=pyav,decord,torchcodec]

It writes a clip of 1280 x 720 pixels with key frames 250 frames apart. Each run is a
process of its own, in turns. The seconds are those of reading, without imports.
Processor seconds vary less on a busy machine. The memory is the peak while a process
reads, above its memory before; it is read from Linux' /proc.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import av  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

READERS = flags.DEFINE_list("readers", "pyav,decord", "Readers; see PROGRAMS.")
BEFORE = flags.DEFINE_string("before", "", "A checkout whose load_frames is measured.")
CLIP = flags.DEFINE_string("clip", "", "A clip to read; '' writes one.")
SECONDS = flags.DEFINE_integer("seconds", 60, "Duration of the written clip.")
RUNS = flags.DEFINE_integer("runs", 5, "Runs of each reader; the median is reported.")
COUNT, SIZE, RATE = 50, 336, 25

# Each ends with 50 frames, and all but the bare decoders with squares of 336 pixels.
OURS = """
from vlmrlaif_jax.data.video import ByCount, Reading, read_video
read = lambda path: read_video(path, Reading(ByCount(50), square=336, decoder={0!r}))
"""
PROGRAMS = {
  "pyav": OURS.format("pyav"),
  "decord": OURS.format("decord"),
  "before": """
from vlmrlaif_jax.data.video import load_frames
read = lambda path: load_frames(path, count=50, size=336)
""",
  "torchcodec": """
import numpy as np
from PIL import Image
from torchcodec.decoders import VideoDecoder
from vlmrlaif_jax.data.decoding.squares import pad_and_resize
def read(path):
  decoder = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
  at = np.linspace(0, decoder.metadata.num_frames - 1, 50, dtype=int).tolist()
  frames = (decoder.get_frame_at(i).data.numpy() for i in at)
  return [np.asarray(pad_and_resize(Image.fromarray(frame), 336)) for frame in frames]
""",
}
MEASURE = """
import json, pathlib, sys, time
pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
lines = pathlib.Path("/proc/self/status").read_text
get_megabytes = lambda key: int(lines().split(key)[1].split()[0]) / 1e3
before, start, used = get_megabytes("VmRSS:"), time.perf_counter(), time.process_time()
read(sys.argv[1])
seconds, used = time.perf_counter() - start, time.process_time() - used
print(json.dumps([seconds, used, get_megabytes("VmHWM:") - before]))
"""


def write_clip(path: pathlib.Path, seconds: int) -> None:
  """Writes a moving texture, whose frames differ as those of a camera do."""
  rng = np.random.default_rng(0)
  texture = rng.integers(0, 256, (900, 1600, 3), np.uint8)
  with av.open(str(path), "w") as container:
    options = {"preset": "veryfast", "crf": "30"}
    stream = container.add_stream("libx264", rate=RATE, options=options)
    stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
    stream.gop_size = 250
    for number in range(seconds * RATE):
      top, left = number % 180, 2 * number % 320
      picture = np.ascontiguousarray(texture[top : top + 720, left : left + 1280])
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def measure(name: str, clip: pathlib.Path) -> list[float]:
  """Returns wall seconds, processor seconds and megabytes of a run in a process."""
  root = BEFORE.value if name == "before" else str(ROOT)
  paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
  done = subprocess.run(
    [sys.executable, "-P", "-c", PROGRAMS[name] + MEASURE, str(clip)],
    env=os.environ | {"PYTHONPATH": paths},
    stdout=subprocess.PIPE,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
  """Measures all readers and prints a table."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  names = READERS.value + (["before"] if BEFORE.value else [])
  with tempfile.TemporaryDirectory() as folder:
    clip = pathlib.Path(CLIP.value or pathlib.Path(folder) / "clip.mp4")
    if not CLIP.value:
      write_clip(clip, SECONDS.value)
    runs = [{name: measure(name, clip) for name in names} for _ in range(RUNS.value)]
    print(f"{clip.name}: {clip.stat().st_size / 1e6:.1f} MB, {RUNS.value} runs")
  print("| reader | processor s | wall s | from | to | peak memory |")
  print("|---|---|---|---|---|---|")
  for name in names:
    wall, used, megabytes = zip(*(run[name] for run in runs), strict=True)
    wall_s, used_s, peak = map(statistics.median, (wall, used, megabytes))
    print(
      f"| {name} | {used_s:.2f} | {wall_s:.2f} | {min(wall):.2f} | {max(wall):.2f} | "
      f"{peak:.0f} MB |"
    )


if __name__ == "__main__":
  app.run(main)
