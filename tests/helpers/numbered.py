"""Clips whose frames show their own number, as 8 blocks of a binary number."""

from fractions import Fraction

import av
import numpy as np

FRAMES = 60
RATE = 25
LIGHT, DARK = 230, 20


def draw_number(number, height=64, width=128):
  picture = np.full((height, width, 3), 40, np.uint8)
  picture[height // 2 :, :, 0] = 4 * number
  for bit in range(8):
    block = slice(bit * width // 8, (bit + 1) * width // 8)
    picture[: height // 2, block] = LIGHT if number >> bit & 1 else DARK
  return picture


def read_numbers(frames):
  found = []
  for frame in frames:
    height, width = frame.shape[:2]
    row = frame[height // 8 : height // 3].mean((0, 2))
    bits = [row[(2 * bit + 1) * width // 16] > 125 for bit in range(8)]
    found.append(sum(int(on) << bit for bit, on in enumerate(bits)))
  return found


def write_numbered(
  path, *, frames=FRAMES, codec="libx264", pixels="yuv420p", gop=12, options=(),
  container=(), format=None, milliseconds=None, height=64, width=128, setup=None,
):  # fmt: skip
  """Writes the clip; `milliseconds` are the times of its frames."""
  with av.open(str(path), "w", format=format, options=dict(container)) as out:
    rate = 1000 if milliseconds else RATE
    stream = out.add_stream(codec, rate=rate, options=dict(options))
    stream.width, stream.height, stream.pix_fmt = width, height, pixels
    stream.gop_size = gop
    stream.codec_context.thread_count = 1
    if setup:
      setup(stream)
    if milliseconds:
      stream.codec_context.time_base = Fraction(1, 1000)
    for number in range(frames):
      picture = draw_number(number, height, width)
      frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
      if milliseconds:
        frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
      out.mux(stream.encode(frame))
    out.mux(stream.encode())
  return path
