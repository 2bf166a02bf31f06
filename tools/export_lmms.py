"""Writes a benchmark's answers in the log layout of lmms-eval, which can score them.

tools/export_lmms.py runs/demo/benchmarks/videomme/ppo --task=videomme --out=logs
               [--checkpoint=FOLDER]

It prints the commands that score these answers, and that have lmms-eval ask a
checkpoint which launch/export.py has exported. The task's documents must be the records
of our file of questions, in their order.
"""

import datetime
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402

from vlmrlaif_jax.evals import lmms_export  # noqa: E402

TASK = flags.DEFINE_string("task", None, "The benchmark's name in lmms-eval.")
OUT = flags.DEFINE_string("out", None, "The folder for the logs.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "CHECKPOINT", "An exported folder.")
flags.mark_flags_as_required(["task", "out"])


def main(argv: list[str]) -> None:
  if len(argv) != 2:
    raise app.UsageError("give one folder, WORKDIR/benchmarks/NAME/POLICY")
  result, out = pathlib.Path(argv[1]).absolute(), pathlib.Path(OUT.value)
  now = datetime.datetime.now(datetime.UTC)
  try:
    paths = lmms_export.write(result, out, TASK.value, now)
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"error: {error}")
  print(*paths, sep="\n")
  print(lmms_export.commands(out, TASK.value, CHECKPOINT.value))


if __name__ == "__main__":
  app.run(main)
