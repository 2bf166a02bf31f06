"""The log of a stage: files on disk and progress on the screen.

`StageLog` writes metrics.jsonl, TensorBoard event files and samples. It shows a live
bar in a terminal. In other streams it prints a plain line every few seconds.
"""

import io
import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from vlmrlaif_jax.core.errors import make_printable
from vlmrlaif_jax.core.files import name_file_in_errors
from vlmrlaif_jax.core.jsonl import format_damage, read_intact_rows, write_records

MAX_PROGRESS_METRICS = 5  # Metrics on a progress line; more exceed 100 columns.
PACE_WINDOW = 20  # Steps over which the pace is averaged.


def split_round(name: str) -> tuple[str, int]:
  """Splits a stage's name into kind and round: "dpo_2" -> ("dpo", 2).

  The round of a stage outside of rounds is 0: "sft" -> ("sft", 0).
  """
  match = re.fullmatch(r"(.+)_(\d+)", name)
  return (match[1], int(match[2])) if match else (name, 0)


class EventFile:
  """A new TensorBoard file of a stage's scalars.

  SummaryWriter writes in a thread, and blocks forever after a failed write. This class
  writes synchronously. A failed write raises.

  Args:
    folder: Folder of the file; it is created if missing.
    first_step: Step from which TensorBoard ignores the points of older files.
  """

  def __init__(self, folder: Path, first_step: int):
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    self._writer = EventsWriter(str(folder / "events"))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(first_step, file_version="brain.Event:2")
    self._write(first_step, session_log=start)

  def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Appends scalars by name."""
    for name, x in values.items():
      self._write(step, summary=summary.scalar(name, x))
    with name_file_in_errors(self._folder):
      self._writer.flush()

  def _write(self, step: int, **content: Any) -> None:
    event = event_pb2.Event(step=step, wall_time=time.time(), **content)
    with name_file_in_errors(self._folder):
      self._writer.write_event(event)


class StageLog:
  """The log of one stage; a context manager.

  Args:
    folder: Output folder; it is created if missing.
    stage: Name of the stage.
    total_steps: Steps (or blocks) of the whole stage.
    every: Seconds between two progress lines in a stream that is no terminal.
    resume_from: Step of the checkpoint from which the run resumes; None for the start.
      Log entries of later steps are removed.
    writes: False to write and print nothing, in all processes but one.
    stream: Output of progress; None for stdout.
    clock: Returns the time in seconds.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    stage: str,
    total_steps: int,
    *,
    every: float | int = 10,
    resume_from: int | None = None,
    writes: bool = True,
    stream: io.StringIO | TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.folder, self.stage, self.total_steps = Path(folder), stage, total_steps
    self.every, self.clock, self.writes = every, clock, writes
    last = -1 if resume_from is None else resume_from
    note = ""
    if writes:
      self.folder.mkdir(parents=True, exist_ok=True)
      note = truncate_log(self.folder, last)
    metrics = self.folder / "metrics.jsonl" if writes else os.devnull
    self._metrics = open(metrics, "a", encoding="utf-8")
    self._board = EventFile(self.folder / "tensorboard", last + 1) if writes else None
    if stream is None:
      stream = sys.stdout if writes else open(os.devnull, "w", encoding="utf-8")
    # Rich treats any stream as a terminal under FORCE_COLOR; log files must be plain.
    tty = stream.isatty()
    self._console = Console(file=stream, force_terminal=tty, width=None if tty else 120)
    self._live = tty and not self._console.is_dumb_terminal
    self._bar = make_bar(self._console)
    self._task = self._bar.add_task(stage, total=total_steps, pace="", metrics="")
    self._marks: deque[tuple[float, int]] = deque(maxlen=PACE_WINDOW)
    self._last_printed = -math.inf  # Time of the last plain line.
    if note:
      self.print_note(note)

  def __enter__(self) -> "StageLog":
    if self._live:
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._live:
      self._bar.stop()
    with name_file_in_errors(self.folder / "metrics.jsonl"):
      self._metrics.close()

  def log_metrics(
    self,
    step: int,
    metrics: Mapping[str, SupportsFloat],
    phases: Mapping[str, float] | None = None,
  ) -> None:
    """Appends one line to metrics.jsonl, and the same numbers to TensorBoard.

    Args:
      step: Training step, or block of a stage that does not train.
      metrics: Scalars by name.
      phases: Seconds by phase since the previous line.
    """
    values = {name: float(value) for name, value in metrics.items()}
    finite = {name: x for name, x in values.items() if math.isfinite(x)}
    # JSON has no NaN, and a browser's parser fails at one.
    line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
    line |= {name: finite.get(name) for name in values}
    if phases:
      line["phases"] = {name: round(x, 4) for name, x in phases.items()}
      finite |= {f"phases/{name}": x for name, x in phases.items()}
    with name_file_in_errors(self.folder / "metrics.jsonl"):
      self._metrics.write(json.dumps(line) + "\n")
      self._metrics.flush()
    if self._board:
      self._board.add_scalars(step, finite)

  def log_progress(
    self, step: int, metrics: Mapping[str, SupportsFloat], note: str = ""
  ) -> None:
    """Updates the live bar, or prints a progress line if the last one is old enough.

    Args:
      step: Number of finished steps.
      metrics: Scalars by name, of which the first five are shown.
      note: Text after the metrics.
    """
    now = self.clock()
    self._marks.append((now, step))
    pace = format_pace(self._marks, self.total_steps)
    words = [f"{name} {format_number(float(x))}" for name, x in metrics.items()]
    words = words[:MAX_PROGRESS_METRICS]
    tail = " ".join([*words, note] if note else words)
    if self._live:
      self._bar.update(self._task, completed=step, pace=pace, metrics=tail)
    elif now - self._last_printed >= self.every or step >= self.total_steps:
      self._last_printed = now
      parts = [f"{self.stage} {step}/{self.total_steps}", pace, tail]
      self.print_note(" | ".join(part for part in parts if part))

  def print_note(self, text: str) -> None:
    """Prints a line; in a terminal it appears above the bar."""
    plain = make_printable(text)
    self._console.print(plain, markup=False, highlight=False, soft_wrap=True)

  def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes samples/step_N.jsonl atomically."""
    if not self.writes:
      return
    write_records(self.folder / "samples" / f"step_{step}.jsonl", rows)

  def print_table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows as a table; the keys of the first row are its columns."""
    if not rows:
      raise ValueError(f"table {title!r} has no rows: pass at least one")
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name, value in rows[0].items():
      table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
      cells = [
        format_number(x) if isinstance(x, float) else str(x) for x in row.values()
      ]
      table.add_row(*map(make_printable, cells))
    self._console.print(table, markup=False, highlight=False)


def make_bar(console: Console) -> Progress:
  """Creates the live line: stage, bar, step/total, pace, metrics."""
  # A narrow terminal truncates only the metrics.
  rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
  return Progress(
    TextColumn("{task.description}"),
    BarColumn(bar_width=16),
    MofNCompleteColumn(),
    TextColumn("{task.fields[pace]}"),
    TextColumn("{task.fields[metrics]}", markup=False, table_column=rest),
    console=console,
    expand=True,
    refresh_per_second=4,
  )


def format_pace(marks: Sequence[tuple[float, int]], total_steps: int) -> str:
  """Formats seconds per step and the remaining time; "" after a single mark.

  Args:
    marks: (clock, step) pairs. The first one follows the first step, so that compile
      time does not count.
    total_steps: Steps of the whole stage.
  """
  (start, first), (now, step) = marks[0], marks[-1]
  if step <= first:
    return ""
  pace = (now - start) / (step - first)
  seconds = f"{pace:.1f}" if pace >= 1 else f"{pace:.2g}"
  left = format_duration(pace * max(total_steps - step, 0))
  return f"{seconds} s/step | eta {left}"


def format_duration(seconds: float | int) -> str:
  """Formats seconds as 7s, 1m27s or 2h05m."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02d}m"
  return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_number(x: float) -> str:
  """Formats a number with three digits or all integer digits: 0.031, 12.5, 20,480."""
  return f"{x:,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:.3g}"


def truncate_log(folder: Path, last: int) -> str:
  """Removes metrics and samples of steps after `last`, and damaged lines.

  Returns:
    A line about damaged lines; "" if there are none.
  """
  path, note = folder / "metrics.jsonl", ""
  if path.exists():
    rows, damaged = read_intact_rows(path)
    steps = [row.get("step") for row in rows]
    write_records(
      path,
      [
        row
        for row, step in zip(rows, steps, strict=True)
        if isinstance(step, int) and step <= last
      ],
    )
    if damaged:
      note = f"{format_damage(path, damaged)}: these metrics are left out"
  for step, path in list_sample_files(folder):
    if step > last:
      path.unlink()
  return note


def list_sample_files(folder: Path) -> list[tuple[int, Path]]:
  """Returns (step, path) of each file of a stage's samples, in order."""
  samples = folder / "samples"
  # A workdir of others may have a link to a folder of the user here.
  paths = () if samples.is_symlink() else samples.glob("step_*.jsonl")
  steps = ((re.fullmatch(r"step_(\d+)", path.stem), path) for path in paths)
  return sorted((int(match[1]), path) for match, path in steps if match)
