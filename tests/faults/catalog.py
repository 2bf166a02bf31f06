"""Faults that the tests try, with what a user sees. docs/reliability.md lists them."""

from typing import NamedTuple

from tests.faults.damage import (
  Damage,
  cut,
  damage_biggest,
  flip,
  insert,
  remove,
  remove_data,
  replace_line,
  unfinish,
  write,
)


class Damaged(NamedTuple):
  """A damaged file of a workdir whose run is finished, and the next start."""

  fault: str
  file: str  # Path in the workdir.
  damage: Damage
  seen: str  # Part of a printed line, "" for none.
  recovered: str
  code: int = 0  # Exit code of the next start.
  changed: tuple[str, ...] = ()  # Files that then differ from those of the first run.


class Tried(NamedTuple):
  """A fault with a test of its own."""

  fault: str
  seen: str
  recovered: str
  test: str  # FILE::NAME, from tests/.


NOTHING = "nothing is lost"
AGAIN = "the stage runs again from what it has saved; results are equal"
STEP = "the step is set aside; the stage trains again from the step before"
LINE = "the line is left out of the log and the report; results are equal"
REFUSED = "the run ends; the message has the remedy"

WORKDIR = (
  Damaged("done.json is cut", "rm/done.json", cut, "rm/done.json is damaged", AGAIN),
  Damaged(
    "done.json is empty", "ppo/done.json", write(b""), "done.json is damaged", AGAIN
  ),
  Damaged(
    "done.json is no object",
    "rm/done.json",
    write(b"[1]"),
    "done.json is damaged",
    AGAIN,
  ),
  Damaged("done.json is missing", "sft_long/done.json", remove, "", AGAIN),
  Damaged(
    "done.json of the evaluation is missing", "eval/done.json", remove, "", AGAIN
  ),
  Damaged(
    "preferences.jsonl is cut",
    "label/preferences.jsonl",
    cut,
    "preferences.jsonl is not what label wrote",
    AGAIN,
  ),
  Damaged(
    "a byte of preferences.jsonl differs",
    "label/preferences.jsonl",
    flip,
    "preferences.jsonl is not what label wrote",
    AGAIN,
  ),
  Damaged(
    "preferences.jsonl is empty",
    "label/preferences.jsonl",
    write(b""),
    "preferences.jsonl is not what label wrote",
    AGAIN,
  ),
  Damaged(
    "preferences.jsonl is missing",
    "label/preferences.jsonl",
    remove,
    "preferences.jsonl is not what label wrote",
    AGAIN,
  ),
  Damaged(
    "rates.json is not JSON",
    "label/rates.json",
    write(b"{x"),
    "rates.json is not",
    AGAIN,
  ),
  Damaged(
    "results.json is empty",
    "eval/results.json",
    write(b""),
    "results.json is not",
    AGAIN,
  ),
  Damaged(
    "results.json is missing", "eval/results.json", remove, "results.json is not", AGAIN
  ),
  Damaged(
    "results.json has another type",
    "eval/results.json",
    write(b'{"held_out": 3}'),
    "results.json is not what eval wrote",
    AGAIN,
  ),
  Damaged(
    "answers.jsonl has a damaged line",
    "eval/answers.jsonl",
    replace_line(1, b"\xff{"),
    "answers.jsonl is not what eval wrote",
    AGAIN,
  ),
  Damaged(
    "metrics.jsonl of a finished stage has a line of NUL bytes",
    "rm/metrics.jsonl",
    insert(b"\0" * 40),
    "metrics.jsonl: line 2 is damaged",
    LINE,
    changed=("rm/metrics.jsonl",),
  ),
  Damaged(
    "metrics.jsonl of a finished stage is not UTF-8",
    "rm/metrics.jsonl",
    insert(b'{"step": "\xff"}'),
    "invalid UTF-8",
    LINE,
    changed=("rm/metrics.jsonl",),
  ),
  Damaged(
    "metrics.jsonl of a stage that resumes has a damaged line",
    "ppo/metrics.jsonl",
    unfinish(insert(b'{"step": 1, "lo')),
    "metrics.jsonl: line 2 is damaged",
    LINE,
  ),
  Damaged(
    "metrics.jsonl of a stage that resumes ends in NUL bytes",
    "ppo/metrics.jsonl",
    unfinish(lambda path: path.write_bytes(path.read_bytes() + b"\0" * 99) and None),
    "",
    NOTHING,
  ),
  Damaged(
    "metrics.jsonl of a stage that resumes has a line without a step",
    "ppo/metrics.jsonl",
    unfinish(insert(b'{"loss": 1.0}')),
    "",
    LINE,
  ),
  Damaged(
    "metrics.jsonl of a finished stage is missing",
    "sft_long/metrics.jsonl",
    remove,
    "",
    "the report has no curves of the stage; results are equal",
    changed=("sft_long/metrics.jsonl",),
  ),
  Damaged(
    "samples have a foreign file name",
    "ppo/samples",
    unfinish(lambda path: (path / "step_x.jsonl").write_text("{}") and None),
    "",
    NOTHING,
    changed=("ppo/samples/step_x.jsonl",),
  ),
  Damaged(
    "a file of samples is no text",
    "ppo/samples/step_2.jsonl",
    write(b"\xd8\xff\0\n" * 9),
    "step_2.jsonl: line 1",
    "the report leaves the lines out",
    changed=("ppo/samples/step_2.jsonl",),
  ),
  Damaged(
    "stage.json is not JSON",
    "rm/stage.json",
    write(b"{"),
    "stage.json is not JSON",
    "the report shows the name of the folder",
    changed=("rm/stage.json",),
  ),
  Damaged(
    "stage.json of a policy is not JSON",
    "ppo/stage.json",
    write(b"{"),
    "stage.json is not JSON",
    "the evaluation runs again; the report shows the name of the folder",
    changed=("ppo/stage.json",),
  ),
  Damaged(
    "checkpoints.json is not JSON",
    "checkpoints.json",
    write(b"{"),
    "checkpoints.json is not JSON",
    "the report leaves it out",
    changed=("checkpoints.json",),
  ),
  Damaged(
    "the largest file of a checkpoint is cut",
    "ppo/checkpoints/3",
    unfinish(damage_biggest(cut)),
    "ppo/checkpoints/3 is damaged",
    STEP,
  ),
  Damaged(
    "the largest file of a checkpoint is empty",
    "ppo/checkpoints/3",
    unfinish(damage_biggest(write(b""))),
    "ppo/checkpoints/3 is damaged",
    STEP,
  ),
  Damaged(
    "the arrays of a checkpoint are missing",
    "ppo/checkpoints/3",
    unfinish(remove_data),
    "ppo/checkpoints/3 is damaged",
    STEP,
  ),
  Damaged(
    "the parameters of a checkpoint are missing",
    "ppo/checkpoints/3/params",
    unfinish(remove),
    "ppo/checkpoints/3 is damaged",
    STEP,
  ),
  Damaged(
    "config.json is cut", "config.json", cut, "config.json is not JSON", REFUSED, 2
  ),
  Damaged(
    "config.json is empty",
    "config.json",
    write(b""),
    "config.json is not JSON",
    REFUSED,
    2,
  ),
  Damaged(
    "config.json is binary",
    "config.json",
    write(b"\xd8\xff\0"),
    "config.json is not JSON",
    REFUSED,
    2,
  ),
  Damaged(
    "config.json is a list",
    "config.json",
    write(b"[1]"),
    "config.json is damaged",
    REFUSED,
    2,
  ),
  Damaged("config.json is missing", "config.json", remove, "", NOTHING),
  Damaged(
    "data.json is not JSON",
    "data.json",
    write(b"{"),
    "data.json is not JSON",
    REFUSED,
    2,
  ),
)
