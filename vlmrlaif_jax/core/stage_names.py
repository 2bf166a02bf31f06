"""Stages that come in rounds, by name: "dpo_2" is round 2 of "dpo"."""

import re


def split_round(name: str) -> tuple[str, int]:
  """("dpo", 2) of "dpo_2"; number 0 for a stage that has no rounds."""
  found = re.fullmatch(r"(.+)_(\d+)", name)
  return (found[1], int(found[2])) if found else (name, 0)
