"""Damaged videos: whole clips of many containers, changed at random places."""

import random
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

CONTAINERS = {
  "clip.mp4": "libx264",
  "clip.avi": "mpeg4",
  "clip.mkv": "libx264",
  "clip.webm": "libvpx",
  "clip.ts": "mpeg2video",
  "clip.flv": "flv",
  "clip.mov": "mjpeg",
}
ANIMATIONS = ("pictures.gif", "pictures.png", "pictures.webp")
SUFFIXES = (".mp4", ".avi", ".gif", ".jpg", ".png", ".mkv", ".txt", "", ".MP4")


def write_whole(folder: Path) -> list[Path]:
  """Writes one clip of each kind, of 24 small frames."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 255, (24, 48, 64, 3), np.uint8)
  for name, codec in CONTAINERS.items():
    with av.open(str(folder / name), "w") as container:
      stream = container.add_stream(codec, rate=12)
      stream.width, stream.height = 64, 48
      stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
      for frame in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
      container.mux(stream.encode())
  images = [Image.fromarray(frame) for frame in frames[:6]]
  for name in ANIMATIONS:
    images[0].save(folder / name, save_all=True, append_images=images[1:], duration=80)
  images[0].save(folder / "picture.jpg")
  return sorted(folder.iterdir())


def write_damaged(
  folder: Path, rng: random.Random, count: int
) -> Iterator[tuple[str, Path]]:
  """Yields what was done to a clip, and the path of the result."""
  whole = write_whole(folder / "whole")
  for number in range(count):
    source = rng.choice(whole)
    damage = rng.choice(DAMAGES)
    data = damage(bytearray(source.read_bytes()), rng, whole)
    suffix = rng.choice(SUFFIXES) if rng.random() < 0.15 else source.suffix
    path = folder / f"{number}{suffix}"
    path.write_bytes(data)
    yield f"{source.name} {damage.__name__} as {path.name}", path


def truncate(data, rng, whole):
  return data[: rng.randrange(len(data))]


def flip_bits(data, rng, whole):
  for _ in range(rng.choice((1, 8, 200))):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  return data


def flip_bits_of_header(data, rng, whole):
  for _ in range(rng.choice((1, 4, 20))):
    data[rng.randrange(min(400, len(data)))] ^= 1 << rng.randrange(8)
  return data


def concatenate(data, rng, whole):
  return data + rng.choice(whole).read_bytes()


def zero_block(data, rng, whole):
  at = rng.randrange(len(data))
  size = min(len(data) - at, rng.choice((16, 512, 4096)))
  data[at : at + size] = bytes(size)
  return data


def insert_noise(data, rng, whole):
  at = rng.randrange(len(data))
  return data[:at] + rng.randbytes(rng.choice((1, 100, 3000))) + data[at:]


def cut_out(data, rng, whole):
  at = rng.randrange(len(data))
  return data[:at] + data[at + rng.choice((1, 64, 2000)) :]


def keep(data, rng, whole):
  return data


DAMAGES = (
  truncate,
  flip_bits,
  flip_bits_of_header,
  concatenate,
  zero_block,
  insert_noise,
  cut_out,
  keep,
)
