"""What the launcher prints of failures in threads, callbacks and repeated warnings."""

import subprocess
import sys
import warnings

import pytest

from launch import failures
from tests.faults.program import ROOT

# A tensor store that answers after its event loop is closed, as after a failed save.
LATE = """
import asyncio, os, sys, threading
import tensorstore
from launch import failures
sys.unraisablehook = failures.print_unraisable_error
class Broken:
  def __del__(self):
    raise ValueError("a cat")
promise, future = tensorstore.Promise.new()
async def wait():
  await future
loop = asyncio.new_event_loop()
task = loop.create_task(wait())
loop.run_until_complete(asyncio.sleep(0.01))
loop.close()
thread = threading.Thread(target=lambda: promise.set_result(1))
thread.start()
thread.join()
if sys.argv[1] == "broken":
  Broken()
os._exit(0)  # Without asyncio's message about the task.
"""


@pytest.mark.parametrize("kind, words", [("late", ""), ("broken", "ValueError: a cat")])
def test_a_late_callback_prints_nothing_and_other_errors_are_printed(kind, words):
  command = [sys.executable, "-c", LATE, kind]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert "Event loop is closed" not in done.stderr
  assert words in done.stderr and bool(done.stderr) == bool(words), done.stderr


def test_a_cache_that_cannot_be_written_is_one_line(capsys, monkeypatch):
  shown = []
  monkeypatch.setattr(warnings, "showwarning", lambda *args, **more: shown.append(args))
  show = failures.make_show_warning()
  for name in ("jit_a", "jit_b"):
    text = f"Error writing persistent compilation cache entry for {name!r}: full"
    show(UserWarning(text), UserWarning, "compiler.py", 1)
  show(UserWarning("another"), UserWarning, "compiler.py", 1)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and "'jit_a'" in lines[0] and len(shown) == 1
