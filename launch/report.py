"""Writes the report of a run, or a comparison of several runs, as one HTML page.

python launch/report.py runs/a                  writes runs/a/report.html
python launch/report.py runs/a --stage=ppo      writes runs/a/ppo/report.html
python launch/report.py runs/a runs/b --out=compare.html

A comparison contains the curves of all runs in one chart, and their results and answers
to the same prompts side by side.
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlmrlaif_jax.report.compare import write_comparison  # noqa: E402
from vlmrlaif_jax.report.page import write_report  # noqa: E402


def main(argv: list[str]) -> None:
  """Writes the page of the arguments and prints its path."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "workdirs", nargs="+", metavar="WORKDIR", help="Workdir of a run; several compare."
  )
  parser.add_argument("--stage", default="", help="Stage of the report; default: all.")
  parser.add_argument(
    "--out", help="Output file. The default of a comparison is compare.html."
  )
  args = parser.parse_args(argv)
  if args.stage and len(args.workdirs) > 1:
    parser.error("--stage works with one workdir only: pass a single WORKDIR")
  try:
    if len(args.workdirs) > 1:
      print(write_comparison(args.workdirs, args.out or "compare.html"))
    else:
      print(write_report(args.workdirs[0], stage=args.stage, out=args.out))
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main(sys.argv[1:])
