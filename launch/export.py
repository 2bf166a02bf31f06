"""Exports a stage: python launch/export.py --workdir=DIR --stage=ppo --out=DIR.

Merged weights that transformers loads, or with --kind=adapter a PEFT adapter; beside
them tokenizer, processor, chat template and a model card.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags, logging

WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.")
STAGE = flags.DEFINE_string("stage", "ppo", "The stage whose policy it is, or rm.")
OUT = flags.DEFINE_string("out", None, "The folder to make.")
KIND = flags.DEFINE_enum("kind", "merged", ["merged", "adapter"], "What to write.")
DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["float32", "bfloat16", "float16"], "Of merged weights."
)
BASE_MODEL = flags.DEFINE_string(
  "base_model", None, "Hub id of the base (OWNER/NAME), written to the model card."
)
flags.mark_flags_as_required(["workdir", "out"])


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  from vlmrlaif_jax.serving import export

  try:
    export.export_stage(
      WORKDIR.value,
      STAGE.value,
      OUT.value,
      kind=KIND.value,
      dtype=DTYPE.value,
      base_model=BASE_MODEL.value,
    )
  except (FileNotFoundError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  app.run(main)
