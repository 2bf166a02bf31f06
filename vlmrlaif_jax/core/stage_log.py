"""What a stage leaves behind and shows while it runs.

On disk: metrics.jsonl, TensorBoard event files and samples. On the screen: a live
bar in a terminal, and now and then a plain line everywhere else.
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
from tensorboardX import SummaryWriter

from vlmrlaif_jax.core.jsonl import read_jsonl, write_records

MAX_PROGRESS_METRICS = 5  # Metrics on the live line; more would not fit in 100 columns.
PACE_WINDOW = 20  # Steps over which the pace is measured.


def split_round(name: str) -> tuple[str, int]:
  """Splits a round from a stage's name: ("dpo", 2) for "dpo_2"; 0 if it has none."""
  found = re.fullmatch(r"(.+)_(\d+)", name)
  return (found[1], int(found[2])) if found else (name, 0)


class StageLog:
  """The log of one stage; a context manager.

  Args:
    folder: where the files go; made if need be.
    every: seconds between two lines where the stream is not a terminal.
    resume_from: step of the checkpoint this run goes on from; None: from the start.
      What an earlier run wrote after that step is dropped.
    writes: False to write and show nothing: of several processes one does.
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
    if writes:
      self.folder.mkdir(parents=True, exist_ok=True)
      truncate_log(self.folder, last)
    metrics = self.folder / "metrics.jsonl" if writes else os.devnull
    self._metrics = open(metrics, "a", encoding="utf-8")
    self._board = SummaryWriter(
      str(self.folder / "tensorboard"),
      purge_step=last + 1,
      flush_secs=10,
      write_to_disk=writes,
    )
    if stream is None:
      stream = sys.stdout if writes else open(os.devnull, "w", encoding="utf-8")
    # Rich would also take FORCE_COLOR for a terminal; a log file must stay plain.
    tty = stream.isatty()
    self._console = Console(file=stream, force_terminal=tty, width=None if tty else 120)
    self._live = tty and not self._console.is_dumb_terminal
    self._bar = make_bar(self._console)
    self._task = self._bar.add_task(stage, total=total_steps, pace="", metrics="")
    self._marks: deque[tuple[float, int]] = deque(maxlen=PACE_WINDOW)
    self._beat = -math.inf  # When the last plain line was printed.

  def __enter__(self) -> "StageLog":
    if self._live:
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    if self._live:
      self._bar.stop()
    self._board.close()
    self._metrics.close()

  def log_metrics(
    self,
    step: int,
    metrics: Mapping[str, SupportsFloat],
    phases: Mapping[str, float] | None = None,
  ) -> None:
    """Appends one line to metrics.jsonl, and the same numbers to TensorBoard.

    Args:
      step: of the training, or block of other stages.
      metrics: scalars by name.
      phases: seconds by phase since the line before.
    """
    values = {name: float(value) for name, value in metrics.items()}
    finite = {name: x for name, x in values.items() if math.isfinite(x)}
    # JSON has no NaN, and a browser's parser stops at one.
    line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
    line |= {name: finite.get(name) for name in values}
    if phases:
      line["phases"] = {name: round(x, 4) for name, x in phases.items()}
      finite |= {f"phases/{name}": x for name, x in phases.items()}
    self._metrics.write(json.dumps(line) + "\n")
    self._metrics.flush()
    for name, x in finite.items():
      self._board.add_scalar(name, x, step)

  def log_progress(
    self, step: int, metrics: Mapping[str, SupportsFloat], note: str = ""
  ) -> None:
    """Says how far the stage is; the first five metrics are shown."""
    now = self.clock()
    self._marks.append((now, step))
    pace = format_pace(self._marks, self.total_steps)
    shown = [f"{name} {format_number(float(x))}" for name, x in metrics.items()][
      :MAX_PROGRESS_METRICS
    ]
    tail = " ".join([*shown, note] if note else shown)
    if self._live:
      self._bar.update(self._task, completed=step, pace=pace, metrics=tail)
    elif now - self._beat >= self.every or step >= self.total_steps:
      self._beat = now
      parts = [f"{self.stage} {step}/{self.total_steps}", pace, tail]
      self.print_note(" | ".join(part for part in parts if part))

  def print_note(self, text: str) -> None:
    """Prints a line; in a terminal it goes above the bar."""
    self._console.print(text, markup=False, highlight=False, soft_wrap=True)

  def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes samples/step_N.jsonl atomically."""
    if not self.writes:
      return
    write_records(self.folder / "samples" / f"step_{step}.jsonl", rows)

  def print_table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows as a table; the keys of the first row are its columns."""
    if not rows:
      raise ValueError(f"table {title!r} has no rows: give at least one")
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name, value in rows[0].items():
      table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
      cells = [
        format_number(x) if isinstance(x, float) else str(x) for x in row.values()
      ]
      table.add_row(*cells)
    self._console.print(table, markup=False, highlight=False)


def make_bar(console: Console) -> Progress:
  """The live line: stage, bar, step/total, pace, metrics."""
  # Where the line is too narrow it is the metrics that are cut short.
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
  """Seconds a step and the time left, from (clock, step) marks; "" until known.

  The first mark comes after the first step, so that compiling is not counted.
  """
  (start, first), (now, step) = marks[0], marks[-1]
  if step <= first:
    return ""
  pace = (now - start) / (step - first)
  seconds = f"{pace:.1f}" if pace >= 1 else f"{pace:.2g}"
  left = format_duration(pace * max(total_steps - step, 0))
  return f"{seconds} s/step | eta {left}"


def format_duration(seconds: float | int) -> str:
  """7s, 1m27s, 2h05m."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02d}m"
  return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def format_number(x: float) -> str:
  """Three digits, and none lost before the point: 0.031, 12.5, 20,480."""
  return f"{x:,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:.3g}"


def truncate_log(folder: Path, last: int) -> None:
  """Removes the metrics and samples of the steps after `last`, and a torn line."""
  path = folder / "metrics.jsonl"
  if path.exists():
    write_records(path, [row for row in read_jsonl(path) if row["step"] <= last])
  for path in (folder / "samples").glob("step_*.jsonl"):
    if int(path.stem.removeprefix("step_")) > last:
      path.unlink()
