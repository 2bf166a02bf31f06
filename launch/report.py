"""The report of a run, or of several beside each other, as one HTML page.

launch/report.py runs/a              writes runs/a/report.html, as the end of a run does
launch/report.py runs/a --stage=ppo  tells of one stage alone: runs/a/ppo/report.html
launch/report.py runs/a runs/b --out=compare.html   curves over each other, results and
                                     answers to the same prompts side by side
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vlmrlaif_jax.report.compare import write_comparison  # noqa: E402
from vlmrlaif_jax.report.page import write_report  # noqa: E402


def main(given: list[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
  parser.add_argument("--stage", default="", help="of which alone to tell")
  parser.add_argument("--out", help="the file; several runs: compare.html by default")
  asked = parser.parse_args(given)
  if asked.stage and len(asked.workdirs) > 1:
    parser.error("--stage is of one workdir: give it alone")
  try:
    if len(asked.workdirs) > 1:
      print(write_comparison(asked.workdirs, asked.out or "compare.html"))
    else:
      print(write_report(asked.workdirs[0], stage=asked.stage, out=asked.out))
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main(sys.argv[1:])
