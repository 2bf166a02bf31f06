"""A benchmark's answers in the log layout of lmms-eval, which can score them again.

tools/export_lmms.py runs/demo/benchmarks/videomme/ppo --task=videomme --out=logs
               [--checkpoint=FOLDER]

It prints the commands: to score these answers, and to have lmms-eval ask a checkpoint
that launch/export.py has exported. The task's documents are to be the records of our
file of questions, in their order.
"""

import argparse
import datetime
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlmrlaif_jax.evals import lmms_export  # noqa: E402


def main(given: list[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "result", type=pathlib.Path, help="WORKDIR/benchmarks/NAME/POLICY"
  )
  parser.add_argument("--task", required=True, help="as lmms-eval calls it")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--checkpoint", default="CHECKPOINT", help="an exported folder")
  args = parser.parse_args(given)
  now = datetime.datetime.now(datetime.UTC)
  try:
    paths = lmms_export.write(args.result.absolute(), args.out, args.task, now)
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"error: {error}")
  print(*paths, sep="\n")
  print(lmms_export.commands(args.out, args.task, args.checkpoint))


if __name__ == "__main__":
  main(sys.argv[1:])
