"""The log: its files, the cut on resume, and what is printed where."""

import io
import json
import math

import pytest
from tensorboardX.proto.event_pb2 import Event

from vlmrlaif_jax.core.stage_log import StageLog, format_duration, format_number


class Terminal(io.StringIO):
  """A stream that says it is a terminal."""

  def isatty(self):
    return True


class Clock:
  """A clock that the test sets."""

  now = 0.0

  def __call__(self):
    return self.now


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(rows):
  return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def test_metrics_are_one_json_line_a_step(tmp_path):
  with StageLog(tmp_path, "ppo", 2, stream=io.StringIO()) as log:
    log.log_metrics(1, {"reward": 0.5, "kl": 0.25})
    log.log_metrics(2, {"reward": 1})
  first, second = read(tmp_path / "metrics.jsonl")
  assert list(first) == ["step", "time", "reward", "kl"]
  assert without_time([first, second]) == [
    {"step": 1, "reward": 0.5, "kl": 0.25},
    {"step": 2, "reward": 1.0},
  ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_that_are_not_finite_become_null(tmp_path, value):
  with StageLog(tmp_path, "rm", 1, stream=io.StringIO()) as log:
    log.log_metrics(1, {"loss": value})
  assert read(tmp_path / "metrics.jsonl")[0]["loss"] is None


def test_metrics_reach_the_disk_while_the_stage_runs(tmp_path):
  with StageLog(tmp_path, "rm", 2, stream=io.StringIO()) as log:
    log.log_metrics(1, {"loss": 0.5})
    assert len(read(tmp_path / "metrics.jsonl")) == 1


def test_tensorboard_file_holds_the_same_numbers(tmp_path):
  with StageLog(tmp_path, "rm", 2, stream=io.StringIO()) as log:
    log.log_metrics(1, {"loss": 0.5, "broken": math.nan})
    log.log_metrics(2, {"loss": 0.25})
  (path,) = (tmp_path / "tensorboard").iterdir()
  found = [
    (event.step, value.tag, value.simple_value)
    for event in events(path.read_bytes())
    for value in event.summary.value
  ]
  assert found == [(1, "loss", 0.5), (2, "loss", 0.25)]


def events(data):
  """TFRecord framing: 8 bytes of length, 4 of CRC, the event, 4 of CRC."""
  while data:
    size = int.from_bytes(data[:8], "little")
    yield Event.FromString(data[12 : 12 + size])
    data = data[12 + size + 4 :]


def test_resumed_metrics_equal_uninterrupted_ones(tmp_path):
  with StageLog(tmp_path / "whole", "sft", 5, stream=io.StringIO()) as log:
    for step in range(1, 6):
      log.log_metrics(step, {"loss": 1 / step})
  with StageLog(tmp_path / "cut", "sft", 5, stream=io.StringIO()) as log:
    for step in range(1, 5):
      log.log_metrics(step, {"loss": 1 / step})
  with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
    file.write('{"step": 5, "ti')  # Killed while writing.
  with StageLog(tmp_path / "cut", "sft", 5, stream=io.StringIO(), resume_from=2) as log:
    for step in range(3, 6):
      log.log_metrics(step, {"loss": 1 / step})
  whole, resumed = (read(tmp_path / x / "metrics.jsonl") for x in ("whole", "cut"))
  assert without_time(resumed) == without_time(whole)


def test_resuming_drops_samples_of_later_steps(tmp_path):
  with StageLog(tmp_path, "ppo", 9, stream=io.StringIO()) as log:
    log.write_samples(2, [{"id": "a"}])
    log.write_samples(10, [{"id": "b"}])
  with StageLog(tmp_path, "ppo", 9, stream=io.StringIO(), resume_from=2):
    assert [x.name for x in (tmp_path / "samples").iterdir()] == ["step_2.jsonl"]


def test_a_stage_from_the_start_has_no_old_metrics(tmp_path):
  for _ in range(2):
    with StageLog(tmp_path, "ppo", 1, stream=io.StringIO()) as log:
      log.log_metrics(0, {"reward": 0.0})
  assert len(read(tmp_path / "metrics.jsonl")) == 1


def test_samples_come_back_as_written(tmp_path):
  rows = [{"id": "a", "response": "a red disk é\n", "truth": None, "score": 0.5}]
  with StageLog(tmp_path, "ppo", 9, stream=io.StringIO()) as log:
    log.write_samples(4, rows)
  assert read(tmp_path / "samples" / "step_4.jsonl") == rows


def test_samples_that_cannot_be_written_leave_no_file(tmp_path):
  with (
    StageLog(tmp_path, "ppo", 9, stream=io.StringIO()) as log,
    pytest.raises(TypeError),
  ):
    log.write_samples(4, [{"id": "a"}, {"id": object()}])
  assert list((tmp_path / "samples").iterdir()) == []


def test_heartbeat_says_step_pace_time_left_and_metrics(tmp_path):
  out, clock = io.StringIO(), Clock()
  with StageLog(tmp_path, "ppo", 40, every=0, stream=out, clock=clock) as log:
    for step in (11, 12):
      log.log_progress(step, {"reward": 0.42, "kl": 0.0312})
      clock.now += 3.1
  assert out.getvalue().splitlines() == [
    "ppo 11/40 | reward 0.42 kl 0.0312",
    "ppo 12/40 | 3.1 s/step | eta 1m27s | reward 0.42 kl 0.0312",
  ]


def test_heartbeat_comes_first_last_and_every_ten_seconds(tmp_path):
  out, clock = io.StringIO(), Clock()
  with StageLog(tmp_path, "sft", 25, stream=out, clock=clock) as log:
    for step in range(1, 26):
      clock.now += 1.0
      log.log_progress(step, {})
  steps = [line.split(" ")[1] for line in out.getvalue().splitlines()]
  assert steps == ["1/25", "11/25", "21/25", "25/25"]


def test_nothing_but_text_goes_to_a_file(tmp_path, monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  out = io.StringIO()
  with StageLog(tmp_path, "ppo", 2, stream=out) as log:
    log.print_note("compiling rollout (first step)...")
    log.log_progress(1, {"reward": 0.1})
    log.print_table("rates", [{"judge": "text", "kept": 0.5}])
    log.log_progress(2, {"reward": 0.1})
  assert [x for x in out.getvalue() if not x.isprintable() and x != "\n"] == []


def test_terminal_shows_a_bar_with_the_metrics(tmp_path, monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  out = Terminal()
  with StageLog(tmp_path, "ppo", 2, stream=out) as log:
    log.print_note("resumed at step 1")
    log.log_progress(2, {"reward": 0.42})
  assert "\x1b[" in out.getvalue()
  assert "━━━" in out.getvalue()
  assert "resumed at step 1\n" in out.getvalue()
  assert "reward 0.42" in out.getvalue()


def test_note_is_printed_as_it_is(tmp_path):
  out = io.StringIO()
  text = "warning: [bold]/a/[0-9]+ " + "long " * 60
  with StageLog(tmp_path, "sft", 1, stream=out) as log:
    log.print_note(text)
  assert out.getvalue() == text + "\n"


def test_table_has_a_line_for_each_row(tmp_path):
  out = io.StringIO()
  with StageLog(tmp_path, "eval", 1, stream=out) as log:
    log.print_table(
      "Accuracy", [{"policy": "sft", "mean": 0.6951}, {"policy": "ppo", "mean": 0.781}]
    )
  lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
  assert lines[0] == ["Accuracy"]
  assert lines[1] == ["policy", "mean"]
  assert lines[3:] == [["sft", "0.695"], ["ppo", "0.781"]]


@pytest.mark.parametrize(
  "seconds, text", [(7.2, "7s"), (87, "1m27s"), (59.7, "1m00s"), (7500, "2h05m")]
)
def test_duration(seconds, text):
  assert format_duration(seconds) == text


@pytest.mark.parametrize(
  "x, text", [(0.0312, "0.0312"), (12.46, "12.5"), (20480.0, "20,480"), (2e-5, "2e-05")]
)
def test_number(x, text):
  assert format_number(x) == text


def test_a_log_that_is_not_to_write_leaves_and_says_nothing(tmp_path, capsys):
  with StageLog(tmp_path / "ppo", "ppo", 1, writes=False) as log:
    log.log_metrics(1, {"reward": 0.5})
    log.log_progress(1, {"reward": 0.5})
    log.write_samples(1, [{"id": "a"}])
    log.print_note("a line")
    log.print_table("a table", [{"a": 1}])
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr() == ("", "")
