"""Serves a chat about a clip: python launch/chat.py --workdir=runs/demo.

The page, http://127.0.0.1:7860, shows the answers of the SFT policy and of the policies
trained from it side by side. --model=FOLDER serves a checkpoint in Hugging Face format.
With --video=clip.mp4 --prompt="What happens?" the program prints the answers and exits.
Several --video and --image flags give several clips and images, in order.
"""

import os
import pathlib
import sys
from typing import NoReturn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags, logging

from vlmrlaif_jax.planner import topologies

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a run.")
MODEL = flags.DEFINE_string("model", None, "Folder of a checkpoint, instead of a run.")
TEMPLATE = flags.DEFINE_string(
  "template", "", "Conversation template of --model; the default is its own."
)
FRAMES = flags.DEFINE_integer(
  "frames",
  None,
  "Frames of a clip for --model. The default is that of its training if "
  "launch/export.py wrote the checkpoint, and 12 otherwise.",
  1,
)
FPS = flags.DEFINE_float(
  "fps",
  0.0,
  "Frames per second of a clip for --model, if its clips differ in length; 0 for those "
  "of the checkpoint.",
  0.0,
)
MAX_FRAMES = flags.DEFINE_integer(
  "max_frames",
  0,
  "Largest number of frames of a clip for --model; 0 for that of the checkpoint.",
  0,
)
MAX_PIXELS = flags.DEFINE_integer(
  "max_pixels",
  0,
  "Largest number of pixels of all frames of a clip for --model, after they are "
  "resized; 0 for that of the checkpoint.",
  0,
)
DTYPE = flags.DEFINE_string(
  "dtype",
  "",
  "Type of the weights of --model: float32 or bfloat16. The default is float32 on a "
  "CPU and bfloat16 on other devices.",
)
# Flags that a run has settings for.
MODEL_FLAGS = (TEMPLATE, FRAMES, FPS, MAX_FRAMES, MAX_PIXELS, DTYPE)
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share each matrix.", 1)
VIDEO = flags.DEFINE_multi_string(
  "video",
  None,
  "Clip or image of the question in --prompt. Several, in order, are given by several "
  "flags.",
)
flags.DEFINE_alias("image", "video")  # One list has the order of both flags.
PROMPT = flags.DEFINE_string("prompt", None, "Question to answer in the terminal.")
TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "Temperature of sampling; 0 decodes greedily.", 0.0
)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Largest length of an answer.", 1)
BEST_OF = flags.DEFINE_integer(
  "best_of", 1, "Answers to sample, of which the one with the best score is used.", 1
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address of the page's server.")
PORT = flags.DEFINE_integer("port", 7860, "Port of the page; 0 for any free port.", 0)
MAX_MB = flags.DEFINE_float("max_mb", 200.0, "Largest size of a clip in MB.", 0.0)
MAX_SECONDS = flags.DEFINE_float(
  "max_seconds", 300.0, "Largest duration of a clip in seconds.", 0.0
)
MAX_PROMPT = flags.DEFINE_integer(
  "max_prompt", 16_384, "Largest number of tokens in a conversation with its clip.", 1
)


def main(argv: list[str]) -> None:
  """Serves the page, or prints the answers to --prompt."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  if (WORKDIR.value is None) == (MODEL.value is None):
    exit_with_error("give --workdir of a run, or --model of a checkpoint")
  passed = [f"--{flag.name}" for flag in MODEL_FLAGS if flag.present]
  if MODEL.value is None and passed:
    exit_with_error(
      f"{', '.join(passed)} can only be given with --model: the policies of --workdir "
      "read videos as in training. Remove it, or export a stage with launch/export.py "
      "and pass its folder by --model"
    )
  if (VIDEO.value is None) != (PROMPT.value is None):
    exit_with_error("--video and --prompt require each other: pass both, or neither")
  from vlmrlaif_jax.core.errors import UserError
  from vlmrlaif_jax.serving.chat_clip import ClipLimits
  from vlmrlaif_jax.serving.chat_stream import ChatQuestion

  limits = ClipLimits(MAX_MB.value, MAX_SECONDS.value)
  question = ChatQuestion(
    PROMPT.value or "", TEMPERATURE.value, MAX_TOKENS.value, BEST_OF.value, SEED.value
  )
  try:
    if PROMPT.value is None:
      serve(open_policies(), limits, question)
    else:
      print_answers(open_policies(), limits, question)
  except (FileNotFoundError, ValueError, UserError) as error:
    exit_with_error(str(error))


def exit_with_error(message: str) -> NoReturn:
  """Prints an error and exits with code 2."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def open_policies():
  """Opens the policies of --workdir, or the checkpoint of --model."""
  import jax

  from vlmrlaif_jax.core import sharding
  from vlmrlaif_jax.runtime import loading, run
  from vlmrlaif_jax.serving import chat_session

  devices = jax.devices()[: TENSOR.value]
  mesh = sharding.make_mesh(fsdp=1, tensor=len(devices), devices=devices)
  note = lambda line: print(line, file=sys.stderr)
  options = dict(max_prompt=MAX_PROMPT.value, note=note)
  if MODEL.value is None:
    return chat_session.open_chat_workdir(WORKDIR.value, mesh, **options)
  model = run.default_config()
  frames = FRAMES.value or chat_session.read_frame_count(MODEL.value)
  dtype = DTYPE.value or ("float32" if loading.is_on_cpu(mesh) else "bfloat16")
  model.update(
    path=MODEL.value,
    template=TEMPLATE.value,
    prompts="brief",
    frames=frames,
    clip_frames=frames,
    fps=FPS.value,
    max_frames=MAX_FRAMES.value,
    max_pixels=MAX_PIXELS.value,
    grids="exact",
    dtype=dtype,
    lora_rank=0,
    lora_alpha=1.0,
  )
  return chat_session.open_model(MODEL.value, model, mesh, **options)


def print_answers(chat, limits, question) -> None:
  """Prints each policy's answer, and the sampled answers with their scores."""
  from vlmrlaif_jax.core.errors import make_printable
  from vlmrlaif_jax.serving import chat_clip, chat_stream

  show = make_printable if sys.stdout.isatty() else str
  clip = chat_clip.read_clips(chat, VIDEO.value, limits)
  *_, last = chat_stream.stream_side_by_side(chat, clip, {}, question)
  for name, answers in last.items():
    print(f"{name}: {show(answers.texts[answers.best])}")
    for _, score, text in answers.rank():
      print(f"  {score:7.3f}  {show(text)}")


def serve(chat, limits, question) -> None:
  """Serves the page until the program is stopped."""
  try:
    from vlmrlaif_jax.serving import chat_page
  except ImportError as error:
    exit_with_error(f'{error}: the page needs gradio; pip install -e ".[chat]"')
  page = chat_page.make_chat_page(
    chat, limits, title=WORKDIR.value or MODEL.value, defaults=question
  )
  chat_page.launch_page(page, host=HOST.value, port=PORT.value, max_mb=limits.max_mb)


if __name__ == "__main__":
  if not topologies.has_accelerator():  # Must be set before jax is imported.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  topologies.import_jax()
  topologies.init_backend()
  app.run(main)
