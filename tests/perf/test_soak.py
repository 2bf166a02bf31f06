"""What the soak tests find: growth, processes, temporary files, other results."""

import json
import subprocess
import sys
import time

import pytest

from perf import soak

STEPS = 300


def readings(**growth):
  """Readings that waver, and grow by so much in the whole run."""
  flat = {"rss_kib": 1_000_000, "files": 10, "threads": 100}
  return [
    soak.Reading(
      step,
      **{k: x + step % 2 + growth.get(k, 0) * step // STEPS for k, x in flat.items()},
    )
    for step in range(1, STEPS + 1)
  ]


def test_a_flat_run_has_no_growth():
  assert soak.find_growth(readings(rss_kib=5000, threads=1)) == []


@pytest.mark.parametrize(
  "name, more", [("rss_kib", 50_000), ("files", 25), ("threads", 9)]
)
def test_what_grows_is_named(name, more):
  (line,) = soak.find_growth(readings(**{name: more}))
  assert line.startswith(name)


def test_growth_during_the_warm_up_does_not_count():
  large = [r._replace(rss_kib=r.step * 9000) for r in readings()[: soak.WARM_UP]]
  assert soak.find_growth(large + readings()[soak.WARM_UP :]) == []


def test_each_line_of_metrics_is_a_reading_of_the_process(tmp_path):
  write = (
    "import sys, time\nfor i in range(3):\n  open(sys.argv[1], 'a').write('x\\n')\n"
  )
  program = f"{write}  time.sleep(0.3)"
  path = tmp_path / "metrics.jsonl"
  with subprocess.Popen([sys.executable, "-c", program, path]) as process:
    found = list(soak.watch_steps(process, path))
  assert [r.step for r in found] == [1, 2, 3]
  assert all(r.rss_kib > 1000 and r.files >= 3 and r.threads == 1 for r in found)


def test_processes_and_temporary_files_that_are_left_are_named(tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "metrics.jsonl").touch()
  assert soak.find_leftovers(workdir, pid=-1) == []
  (workdir / "a.json.0f.tmp").touch()
  with subprocess.Popen(["sleep", "9"], start_new_session=True) as process:
    lines = soak.find_leftovers(workdir, process.pid)
    process.kill()
  assert lines == [
    f"process {process.pid} is left", f"{workdir / 'a.json.0f.tmp'} is left"
  ]  # fmt: skip


def test_a_process_is_stopped_after_the_delay():
  with subprocess.Popen(["sleep", "9"]) as process:
    assert soak.stop_after(process, 0.1) == soak.KILLED[0]


def test_results_are_compared_without_times(tmp_path):
  for name, loss in (("whole", 1.0), ("same", 1.0), ("other", 2.0)):
    folder = tmp_path / name / "ppo"
    folder.mkdir(parents=True)
    row = {"step": 1, "loss": loss, "time": time.time()}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  assert soak.compare(tmp_path / "whole", tmp_path / "same") == []
  assert soak.compare(tmp_path / "whole", tmp_path / "other") == [
    f"{tmp_path / 'other' / 'ppo' / 'metrics.jsonl'} differs"
  ]
