"""Damaged data files: records and preferences of public formats, changed at random."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TURNS = [
  {"from": "human", "value": "<video>\nWhat is shown?"},
  {"from": "gpt", "value": "Two bars."},
]
MESSAGES = [
  {"role": "system", "content": "Be brief."},
  {
    "role": "user",
    "content": [
      {"type": "video", "video": "clip.mp4"},
      {"type": "text", "text": "What is shown?"},
    ],
  },
  {"role": "assistant", "content": [{"type": "text", "text": "Two bars."}]},
]
RECORDS: list[dict[str, Any]] = [
  {"id": "1", "video": "clip.mp4", "conversations": TURNS},
  {"id": 2, "video": "clip.mp4", "question": "What is shown?", "answer": "Bars."},
  {"id": "3", "messages": MESSAGES},
  {
    "messages": [
      {"role": "user", "content": "<video>What?"},
      {"role": "assistant", "content": "Bars."},
    ],
    "videos": ["clip.mp4"],
  },
  {"conversations": TURNS, "videos": ["clip.mp4"], "system": "Be brief."},
  {"id": "4", "video": "clip.mp4", "conversations": TURNS * 2, "start": 0, "end": 1.5},
  {"id": "5", "images": ["clip.mp4", "clip.mp4"], "conversations": TURNS},
]
PREFERENCES: list[dict[str, Any]] = [
  {
    "id": "1",
    "video": "clip.mp4",
    "conversations": TURNS[:1],
    "output_1": {"from": "llm", "value": "Two bars."},
    "output_2": {"from": "llm", "value": "A cat."},
    "preference": 1,
  },
  {"id": "2", "video": "clip.mp4", "prompt": "What?", "chosen": "A.", "rejected": "B."},
  {
    "videos": ["clip.mp4"],
    "prompt": MESSAGES[:2],
    "chosen": MESSAGES[2:],
    "rejected": [{"role": "assistant", "content": "A cat."}],
  },
  {
    "idx": 3,
    "image_path": "clip.mp4",
    "question": "What?",
    "chosen": "A.",
    "rejected": "B.",
  },
]
ODD_VALUES: tuple[Any, ...] = (
  None,
  "",
  " ",
  0,
  -1,
  1.5,
  float("nan"),
  float("inf"),
  10**400,
  True,
  [],
  {},
  [[]],
  [None],
  {"value": {}},
  "\ud800",
  "\0",
  "a\nb",
  "<video>",
  "<image><image>",
  "</s>",
  "../../etc/passwd",
  "/dev/zero",
  "clip.mp4#t=5,1",
  "x" * 5000,
  "回答",
)


def _list_places(value: Any, place: tuple = ()) -> Iterator[tuple]:
  if isinstance(value, dict | list):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
      yield (*place, key)
      yield from _list_places(inner, (*place, key))


def change_row(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
  """Returns a copy of a row with a value replaced, removed, renamed or repeated."""
  row = copy.deepcopy(row)
  for _ in range(rng.choice((1, 1, 2, 4))):
    places = list(_list_places(row))
    if not places:
      return row
    *path, key = rng.choice(places)
    holder: Any = row
    for step in path:
      holder = holder[step]
    action = rng.randrange(4)
    if action == 0:
      holder[key] = rng.choice(ODD_VALUES)
    elif action == 1:
      del holder[key]
    elif action == 2 and isinstance(holder, dict):
      holder[rng.choice(("text", "media", "reward", key + "_"))] = holder.pop(key)
    elif isinstance(holder, list):
      holder.append(copy.deepcopy(holder[key]))
    else:
      holder[key] = [holder[key]]
  return row


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
  """Returns the bytes of a file truncated, changed, or in another encoding."""
  action = rng.randrange(6)
  if action == 0:
    return data[: rng.randrange(len(data))]
  if action == 1:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 5, 50))):
      changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)
  if action == 2:
    return data.decode().encode("utf-16")
  if action == 3:
    return b"\xef\xbb\xbf" + data
  if action == 4:
    return b"[" * rng.choice((10, 100_000)) + data
  return data + rng.choice((b"\0", b"{", b"]", b"\xff", b"\n\n[]"))


def write_files(
  folder: Path, rng: random.Random, count: int
) -> Iterator[tuple[Path, bool, int]]:
  """Yields (file, whether it has preferences, rows) of damaged data files."""
  for number in range(count):
    has_preferences = rng.random() < 0.4
    whole = PREFERENCES if has_preferences else RECORDS
    rows = [copy.deepcopy(rng.choice(whole)) for _ in range(rng.choice((1, 3, 8)))]
    if rng.random() < 0.8:
      at = rng.randrange(len(rows))
      rows[at] = change_row(rows[at], rng)
    is_list = rng.random() < 0.4
    text = (
      json.dumps(rows) if is_list else "".join(json.dumps(row) + "\n" for row in rows)
    )
    data = text.encode()
    is_damaged = rng.random() < 0.3
    path = folder / f"{number}.{'json' if is_list else 'jsonl'}"
    path.write_bytes(damage_bytes(data, rng) if is_damaged else data)
    yield path, has_preferences, 0 if is_damaged else len(rows)
