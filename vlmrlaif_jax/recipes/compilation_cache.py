"""The cache of compiled programs, in a folder that only its user may write.

JAX executes what the folder contains. A folder next to the workdir may belong to other
users, or come with a run of others.
"""

import os
import stat
from pathlib import Path

import jax

from vlmrlaif_jax.core import distributed

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def use_private_cache() -> None:
  """Caches compiled programs of all runs, unless JAX_COMPILATION_CACHE_DIR is set.

  Without a private folder nothing is cached, and a line states the reason.
  """
  if jax.config.values["jax_compilation_cache_dir"] is not None:
    return
  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = Path(base) / "vlmrlaif_jax" / "jax"
  try:
    make_private_folder(folder, os.geteuid())
  except OSError as error:
    distributed.print_once(
      f"compiled programs are not cached: {error}. Set JAX_COMPILATION_CACHE_DIR to a "
      "folder that only you can write"
    )
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))


def make_private_folder(folder: Path, user: int) -> None:
  """Creates a folder and its parent for one user alone.

  Args:
    folder: The folder.
    user: Id of the user of this process.

  Raises:
    OSError: The folder cannot be created, or another user owns it or its parent, or may
      write there.
  """
  folder.parent.parent.mkdir(parents=True, exist_ok=True)
  for path in (folder.parent, folder):
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.stat()
    if status.st_uid != user:
      raise OSError(f"{path} belongs to user {status.st_uid}, not to {user}")
    if status.st_mode & WRITABLE_BY_OTHERS:
      mode = f"{stat.S_IMODE(status.st_mode):o}"
      raise OSError(f"other users may write {path}, whose mode is {mode}")
