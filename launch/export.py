"""Exports a stage: python launch/export.py --workdir=DIR --stage=ppo --out=DIR.

The output is merged weights that transformers loads, or with --kind=adapter a PEFT
adapter. The folder also contains the tokenizer, the processor, the chat template and a
model card. --kind=decoder writes the base's language model, for rollout.engine=vllm.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags, logging

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of the run.")
STAGE = flags.DEFINE_string(
  "stage", "ppo", "Stage whose policy is exported, or rm for the reward model."
)
OUT = flags.DEFINE_string("out", None, "Output folder.")
KIND = flags.DEFINE_enum(
  "kind",
  "merged",
  ["merged", "adapter", "decoder"],
  "Merged weights, a PEFT adapter, or the base's language model for servers.",
)
DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["float32", "bfloat16", "float16"], "Type of merged weights."
)
BASE_MODEL = flags.DEFINE_string(
  "base_model", None, "Hub id of the base model (OWNER/NAME) for the model card."
)
flags.mark_flags_as_required(["workdir", "out"])


def main(argv: list[str]) -> None:
  """Exports the stage of the flags."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  from vlmrlaif_jax.core.errors import UserError
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
  except (FileNotFoundError, ValueError, UserError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  app.run(main)
