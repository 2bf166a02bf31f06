"""A lock on a workdir, so that only one run writes in it.

The lock is WORKDIR/run.lock, with the host and the process of its holder. The holder
also has an advisory lock (flock) on the file, which the kernel removes when the process
ends for any reason. Some network file systems have no flock, or one that other hosts do
not see. Therefore the holder also renews a time in the file, its heartbeat.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vlmrlaif_jax.core.errors import UserError

LOCK_FILE = "run.lock"
HEARTBEAT_S = 10.0  # Seconds between two heartbeats.
ABANDONED_S = (
  60.0  # Seconds without a heartbeat after which a lock counts as abandoned.
)
SETTLE_S = 1.0  # Seconds after which what another process writes is visible.
FILE_BYTES = 512  # Fixed, so that renewing a lock never leaves parts of the old text.


class Holder(NamedTuple):
  """The content of a lock file."""

  host: str
  pid: int
  kernel: (
    str  # Identifies the kernel and the process namespace in which `pid` is valid.
  )
  token: str  # Unique per holder.
  started: float  # Unix time in seconds.
  heartbeat: float  # Unix time in seconds.


class WorkdirInUse(UserError):
  """An error because another run holds the workdir."""


class LostLock(UserError):
  """An error because the workdir was removed, or taken over by another run."""


@contextlib.contextmanager
def hold_workdir(
  root: pathlib.Path,
  note: Callable[[str], None] = print,
  *,
  on_taken: Callable[[LostLock], None] = lambda error: None,
  heartbeat_s: float | int = HEARTBEAT_S,
  stale_s: float | int = ABANDONED_S,
  has_flock: bool = True,
) -> Iterator[Callable[[], None]]:
  """Locks a workdir during a block; yields a function that raises if the lock is lost.

  Args:
    root: The workdir, created if missing.
    note: Receives a line if the lock of a dead run is replaced.
    on_taken: Called in a thread when another run has taken over the workdir, as it may
      after this process was stopped for long. Each further write harms the other run.
    heartbeat_s: Seconds between two heartbeats.
    stale_s: Seconds without a heartbeat after which another host's lock is abandoned.
    has_flock: False to use heartbeats alone, as on a file system without flock.

  Raises:
    WorkdirInUse: Another run holds the workdir.
  """
  root.mkdir(parents=True, exist_ok=True)
  path = root / LOCK_FILE
  own = _describe_self()
  file, is_flocked = _open_locked(path, has_flock=has_flock)
  ended = threading.Event()
  try:
    _take(file, path, own, note, is_flocked=is_flocked, stale_s=stale_s)
    beat = threading.Thread(
      target=_renew, args=(file, path, own, ended, heartbeat_s, on_taken), daemon=True
    )
    beat.start()
    try:
      yield lambda: _check_own(path, own)
    finally:
      ended.set()
      beat.join()
      if _has_token(path, own):
        path.unlink(missing_ok=True)
  finally:
    os.close(file)


def read_holder(path: pathlib.Path) -> Holder | None:
  """Returns the content of a lock file; None if it is missing, empty or damaged."""
  try:
    return Holder(**json.loads(path.read_bytes()))
  except (OSError, ValueError, TypeError):
    return None


def _describe_self() -> Holder:
  now = time.time()
  return Holder(
    socket.gethostname(), os.getpid(), _identify_kernel(), uuid.uuid4().hex, now, now
  )


def _identify_kernel() -> str:
  """Identifies the kernel and the process namespace; the host's name elsewhere."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return socket.gethostname()


def _open_locked(path: pathlib.Path, *, has_flock: bool) -> tuple[int, bool]:
  """Opens the lock file; returns its descriptor and whether flock locks it.

  Raises:
    WorkdirInUse: A living process has the flock.
  """
  while True:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      is_flocked = has_flock and _flock(file)
    except BlockingIOError:
      os.close(file)
      raise _make_refusal(path, _await_holder(path)) from None
    # The previous holder may have removed the file since it was opened.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file), path.stat()):
        return file, is_flocked
    os.close(file)


def _await_holder(path: pathlib.Path) -> Holder | None:
  """Returns the holder, which may just have locked the file and not written in it."""
  deadline = time.monotonic() + SETTLE_S
  while (holder := read_holder(path)) is None and time.monotonic() < deadline:
    time.sleep(0.05)
  return holder


def _flock(file: int) -> bool:
  """Locks a file; returns False if its file system has no flock."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise
  except OSError:
    return False
  return True


def _take(
  file: int,
  path: pathlib.Path,
  own: Holder,
  note: Callable[[str], None],
  *,
  is_flocked: bool,
  stale_s: float | int,
) -> None:
  """Writes the own name into the lock file unless its holder lives.

  Raises:
    WorkdirInUse: The holder lives.
  """
  if holder := read_holder(path):
    if not _is_dead(holder, is_flocked=is_flocked):
      _wait_until_stale(path, holder, note, stale_s)
    note(
      f"{path}: the run of process {holder.pid} on {holder.host} ended without "
      "releasing the workdir; this run takes over"
    )
  _write(file, own)
  if not is_flocked:
    time.sleep(SETTLE_S)
    if not _has_token(path, own):
      raise _make_refusal(path, read_holder(path))


def _is_dead(holder: Holder, *, is_flocked: bool) -> bool:
  """Returns whether the holder is a process of this kernel that has ended."""
  if holder.kernel != _identify_kernel():
    return False
  if is_flocked:  # The kernel would not have given the flock of a living process.
    return True
  try:
    os.kill(holder.pid, 0)
  except ProcessLookupError:
    return True
  except PermissionError:  # The process is of another user.
    pass
  return False


def _wait_until_stale(
  path: pathlib.Path, holder: Holder, note: Callable[[str], None], stale_s: float | int
) -> None:
  """Returns when the heartbeat is older than `stale_s`; raises if it is renewed."""
  silent_s = min(max(time.time() - holder.heartbeat, 0), stale_s)
  deadline = time.monotonic() + stale_s - silent_s
  if silent_s < stale_s:
    note(
      f"{path} is of process {holder.pid} on {holder.host}: waiting up to "
      f"{stale_s - silent_s:.0f} s for a sign of life"
    )
  while time.monotonic() < deadline:
    time.sleep(min(1, stale_s / 10))
    now = read_holder(path)
    if now and now != holder:
      raise _make_refusal(path, now)


def _make_refusal(path: pathlib.Path, holder: Holder | None) -> WorkdirInUse:
  who = "another process"
  if holder:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.started))
    who = f"process {holder.pid} on {holder.host}, since {since}"
  return WorkdirInUse(
    f"another run uses the workdir {path.parent}: {who}. Wait for its end, stop it, or "
    "give this run another --workdir"
  )


def _renew(
  file: int,
  path: pathlib.Path,
  own: Holder,
  ended: threading.Event,
  every_s: float,
  on_taken: Callable[[LostLock], None],
) -> None:
  """Renews the heartbeat until the run ends or another run has the lock."""
  while not ended.wait(every_s):
    if _is_lost(path, own):
      if holder := read_holder(path):
        on_taken(_make_taken(path, holder))
      return
    # A full disk or a short failure of a network must not end the run here.
    with contextlib.suppress(OSError):
      _write(file, own._replace(heartbeat=time.time()))


def _write(file: int, holder: Holder) -> None:
  os.pwrite(file, json.dumps(holder._asdict()).encode().ljust(FILE_BYTES), 0)


def _has_token(path: pathlib.Path, own: Holder) -> bool:
  holder = read_holder(path)
  return holder is not None and holder.token == own.token


def _is_lost(path: pathlib.Path, own: Holder) -> bool:
  """Returns whether the lock file is missing or has another holder.

  A file that cannot be read for the moment, as during a failure of a network, is not
  lost.
  """
  holder = read_holder(path)
  if holder is not None:
    return holder.token != own.token
  try:
    path.stat()
  except (FileNotFoundError, NotADirectoryError):
    return True
  except OSError:
    pass
  return False


def _check_own(path: pathlib.Path, own: Holder) -> None:
  """Raises LostLock if the lock is lost."""
  if not _is_lost(path, own):
    return
  holder = read_holder(path)
  if holder is None:
    raise LostLock(
      f"the workdir {path.parent} or its {path.name} was removed during the run. "
      "Outputs in the folder may be incomplete: remove the folder, and start again"
    )
  raise _make_taken(path, holder)


def _make_taken(path: pathlib.Path, holder: Holder) -> LostLock:
  return LostLock(
    f"process {holder.pid} on {holder.host} has taken over the workdir {path.parent}, "
    f"because this run gave no sign for {ABANDONED_S:.0f} s: continue the other run"
  )
