"""Talks to checkpoints about a clip: python launch/chat.py --workdir=runs/demo.

A page on this machine, http://127.0.0.1:7860, with the policies of SFT and of what was
made of it side by side; --model=FOLDER for a checkpoint in Hugging Face's form. With
--video=clip.mp4 --prompt="What happens?" it prints the answers and ends.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags, logging

from vlmrlaif_jax.planner import topologies

WORKDIR = flags.DEFINE_string("workdir", None, "Of a run.")
MODEL = flags.DEFINE_string("model", None, "A checkpoint's folder, in place of a run.")
TEMPLATE = flags.DEFINE_string("template", "", "Of --model; its own unless given.")
FRAMES = flags.DEFINE_integer("frames", 12, "Of a clip, that --model sees.", 1)
DTYPE = flags.DEFINE_string("dtype", "", "Of --model: float32 or bfloat16.")
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share the matrices.", 1)
VIDEO = flags.DEFINE_string("video", None, "The clip that --prompt asks about.")
PROMPT = flags.DEFINE_string("prompt", None, "A question to answer in the terminal.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the likeliest answer.", 0.0)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Of an answer.", 1)
BEST_OF = flags.DEFINE_integer("best_of", 1, "Answers whose best is taken.", 1)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address that the page listens at.")
PORT = flags.DEFINE_integer("port", 7860, "Of the page; 0: any that is free.", 0)
MAX_MB = flags.DEFINE_float("max_mb", 200.0, "Of a clip.", 0.0)
MAX_SECONDS = flags.DEFINE_float("max_seconds", 300.0, "Of a clip.", 0.0)
MAX_PROMPT = flags.DEFINE_integer(
  "max_prompt", 2048, "Tokens of a conversation, clip included.", 1
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  if (WORKDIR.value is None) == (MODEL.value is None):
    refuse("give --workdir of a run, or --model of a checkpoint")
  if (VIDEO.value is None) != (PROMPT.value is None):
    refuse("--video and --prompt go together: the answer is printed")
  from vlmrlaif_jax.core.errors import UserError
  from vlmrlaif_jax.serving.chat_clip import ClipLimits
  from vlmrlaif_jax.serving.chat_stream import ChatQuestion

  limits = ClipLimits(MAX_MB.value, MAX_SECONDS.value)
  asked = ChatQuestion(
    PROMPT.value or "", TEMPERATURE.value, MAX_TOKENS.value, BEST_OF.value, SEED.value
  )
  try:
    if PROMPT.value is None:
      serve(opened(), limits, asked)
    else:
      print_answers(opened(), limits, asked)
  except (FileNotFoundError, ValueError, UserError) as error:
    refuse(str(error))


def refuse(why: str) -> None:
  print(f"error: {why}", file=sys.stderr)
  sys.exit(2)


def opened():
  """The policies to talk to."""
  import jax

  from vlmrlaif_jax.core import sharding
  from vlmrlaif_jax.runtime import loading, run
  from vlmrlaif_jax.serving import chat_session

  devices = jax.devices()[: TENSOR.value]
  mesh = sharding.make_mesh(fsdp=1, tensor=len(devices), devices=devices)
  note = lambda line: print(line, file=sys.stderr)
  told = dict(max_prompt=MAX_PROMPT.value, note=note)
  if MODEL.value is None:
    return chat_session.open_chat_workdir(WORKDIR.value, mesh, **told)
  model = run.default_config()
  dtype = DTYPE.value or ("float32" if loading.is_on_cpu(mesh) else "bfloat16")
  model.update(
    path=MODEL.value,
    template=TEMPLATE.value,
    prompts="brief",
    frames=FRAMES.value,
    clip_frames=FRAMES.value,
    dtype=dtype,
    lora_rank=0,
    lora_alpha=1.0,
  )
  return chat_session.open_model(MODEL.value, model, mesh, **told)


def print_answers(chat, limits, asked) -> None:
  """Each policy's answer, and all of them with their scores."""
  from vlmrlaif_jax.serving import chat_clip, chat_stream

  clip = chat_clip.read_clip(chat, VIDEO.value, limits)
  *_, last = chat_stream.stream_side_by_side(chat, clip, {}, asked)
  for name, said in last.items():
    print(f"{name}: {said.texts[said.best]}")
    for _, score, text in said.rank():
      print(f"  {score:7.3f}  {text}")


def serve(chat, limits, asked) -> None:
  """Shows the page until it is stopped."""
  try:
    from vlmrlaif_jax.serving import chat_page
  except ImportError as error:
    refuse(f'{error}: the page needs gradio; pip install -e ".[chat]"')
  page = chat_page.make_chat_page(
    chat, limits, title=WORKDIR.value or MODEL.value, defaults=asked
  )
  chat_page.launch_page(page, host=HOST.value, port=PORT.value, max_mb=limits.max_mb)


if __name__ == "__main__":
  if not topologies.has_accelerator():  # To be said before jax is imported.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  app.run(main)
