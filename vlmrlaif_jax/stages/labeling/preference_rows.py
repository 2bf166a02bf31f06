"""Rows of labels: the blocks of the stage `label`, and preferences.jsonl."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmrlaif_jax.core import distributed, jsonl
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.templates import MEDIA_MARK, show_media
from vlmrlaif_jax.data.video import MediaList, VideoPath

BLOCK_SIZE = "block_size"  # Key of the number of rows in a block.
# Keys of a row of a block that the results and later stages read.
BLOCK_KEYS = frozenset(
  ("id", "outcome", "preference", "outputs", "verdicts", "choices", "mistakes")
)


def make_preference(
  example: Example, row: JsonRow, videos: pathlib.Path, *, judge_text: str
) -> JsonRow:
  """Returns a pair in the format of records.read_preferences and of the report.

  Args:
    example: Example of the prompt.
    row: Row of the prompt; see label_block.
    videos: Folder. Paths of videos in it are written relative to it, so that a workdir
      can be moved.
    judge_text: Response of the judge.
  """
  outputs = row["outputs"]
  make_turn = lambda role, text: {"from": role, "value": text}
  shorten = lambda path: (
    os.path.relpath(path, videos) if pathlib.Path(path).is_relative_to(videos) else path
  )
  place, question = _write_media(example, shorten)
  return {
    "id": row["id"],
    **place,
    "src_data": example["source"],
    "conversations": [
      make_turn("human", question),
      make_turn("gpt", outputs[row["preference"] - 1]),
    ],
    "question": show_media(example["question"]),
    "output_1": make_turn("gpt", outputs[0]),
    "output_2": make_turn("gpt", outputs[1]),
    "preference": row["preference"],
    "judge": judge_text,
    "judge_text": judge_text,
    "narrative": row["narrative"],
    "agrees_with_truth": is_agreeing_with_truth(row),
    "flags": {"stopped": row["stopped"]},
    **({"truth": example["truth"]} if "truth" in example else {}),
  }


def _write_media(
  example: Example, shorten: Callable[[str], str]
) -> tuple[dict[str, Any], str]:
  """Returns the keys of an example's videos, and its question with placeholders."""
  video, question = example["video"], example["question"]
  if isinstance(video, MediaList):
    places = "" if MEDIA_MARK in question else f"{MEDIA_MARK * len(video.paths)}\n"
    names = [_shorten_all(path, shorten) for path in video.paths]
    return {"videos": names}, show_media(places + question)
  question = f"<image>\n{question.replace(MEDIA_MARK, '')}"
  key = "video" if isinstance(video, str) else "images"
  return {key: _shorten_all(video, shorten)}, question


def _shorten_all(path: VideoPath, shorten: Callable[[str], str]) -> str | list[str]:
  if isinstance(path, str | os.PathLike):
    return shorten(os.fspath(path))
  return [shorten(frame) for frame in path]


def is_agreeing_with_truth(row: Mapping[str, Any]) -> bool | None:
  """Returns whether the preferred answer has fewer mistakes.

  None if no answer is preferred, both have equally many, or the truth is unknown.
  """
  first, second = row["mistakes"]
  if row["preference"] is None or first is None or first == second:
    return None
  return (first < second) == (row["preference"] == 1)


def write_block(path: pathlib.Path, rows: Sequence[JsonRow]) -> None:
  """Writes the rows of a block with checksums and their number."""
  sealed = [jsonl.seal_row({**row, BLOCK_SIZE: len(rows)}) for row in rows]
  jsonl.write_records(path, sealed)


def read_block(path: pathlib.Path, examples: Sequence[Example]) -> list[JsonRow] | None:
  """Returns the rows of a block; None if its file is missing or damaged.

  Raises:
    UserError: The block is intact and has other prompts.
  """
  if not path.exists():
    return None
  rows, damaged = jsonl.read_intact_rows(path)
  is_cut = not rows or any(row.get(BLOCK_SIZE, len(rows)) != len(rows) for row in rows)
  if damaged or is_cut or not all(row.keys() >= BLOCK_KEYS for row in rows):
    why = damaged or {len(rows) + 1: "rows or keys are missing"}
    line = jsonl.format_damage(path, why)
    distributed.print_once(f"{line}: labeling the block again")
    return None
  if [row["id"] for row in rows] != [example["id"] for example in examples]:
    raise UserError(
      f"{path} holds other prompts than this run has: remove {path.parent}, or restore "
      "the previous --config.label.block, --config.seed and data"
    )
  return rows
