"""Saves and restores a TrainState. No other module uses Orbax.

A checkpoint is a directory PATH/STEP of two items: `params`, and `optimizer` with the
rest of the TrainState. A later stage can therefore restore the parameters alone.

All processes save and restore together, each its own shards, in a folder on a shared
file system. A checkpoint can be restored on another number of processes and on another
mesh.

Saving waits until the files are complete, so that a step that was reported as saved
survives a kill. The wait is short, because only trained parameters are saved.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import Params, TrainState

# Errors of the machine, after which the files of a checkpoint may be intact.
MACHINE_ERRORS = (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM)

REMOVE_S = 3.0  # Seconds to remove a step that could not be saved.
MAX_CAUSE = 160  # Characters of an error of Orbax, which may fill pages.


class OtherArrays(ValueError):
  """An error about a checkpoint of a model with other arrays."""


class DamagedCheckpoint(UserError):
  """An error about a checkpoint whose files are damaged.

  Args:
    folder: Folder of the checkpoint, PATH/STEP.
    reason: The error of Orbax.
  """

  def __init__(self, folder: str, reason: str):
    self.folder = folder
    super().__init__(
      f"the checkpoint {folder} is damaged ({reason}): restore it from a copy. Or "
      "remove it and the done.json of its stage; the same command then trains the "
      "stage again from an earlier checkpoint, or from the start"
    )


def save_train_state(path: str, state: TrainState, step: int, *, keep: int) -> None:
  """Writes PATH/STEP atomically and removes all but the latest `keep` steps.

  Every process calls this function with its shards of the same state.

  Args:
    path: Folder of the checkpoints.
    state: State to save.
    step: Number of the step.
    keep: Number of steps that stay on disk, including this one.

  Raises:
    ValueError: The step exists already, or `keep` is less than 1.
  """
  if keep < 1:
    raise ValueError(f"keep must be 1 or more checkpoints, not {keep}")
  directory = _make_absolute(path)
  options = ocp.CheckpointManagerOptions(
    preservation_policy=ocp.checkpoint_managers.LatestN(keep),
    enable_async_checkpointing=False,
    cleanup_tmp_directories=True,  # Left by a killed process.
  )
  items = ocp.args.Composite(
    **{name: ocp.args.StandardSave(tree) for name, tree in _split_items(state).items()}
  )
  with ocp.CheckpointManager(directory, options=options) as manager:
    if step in manager.all_steps():
      raise ValueError(
        f"{directory} already holds step {step}: resume from it, remove it, or "
        "save to another folder"
      )
    try:
      # Without `force`, Orbax skips a step that is lower than the latest one.
      manager.save(step, args=items, force=True)
    except Exception:
      _remove_unfinished(directory, step)  # On a full disk its space is needed.
      raise


def _remove_unfinished(directory: epath.Path, step: int) -> None:
  """Removes what a failed save has written of a step, as far as possible."""
  if not distributed.is_process_zero():
    return
  deadline = time.monotonic() + REMOVE_S
  while paths := [*directory.glob(f"{step}.orbax-checkpoint-tmp*")]:
    for path in paths:
      with contextlib.suppress(OSError):
        path.rmtree()
    if time.monotonic() > deadline:
      return
    time.sleep(0.05)  # Threads of Orbax may still write.


def restore_checkpoint(
  path: str, like: TrainState, step: int | None = None
) -> TrainState:
  """Returns the state that was saved.

  Args:
    path: Folder of the checkpoints.
    like: Arrays or ShapeDtypeStructs. The restored arrays have their shardings, which
      may be of another mesh than that of the saved ones.
    step: Step to restore; None for the latest.

  Raises:
    FileNotFoundError: There is no such checkpoint.
    ValueError: The saved arrays differ from those of `like`.
    DamagedCheckpoint: Files of the checkpoint are damaged or missing, or a parameter
      is not finite.
  """
  items = _restore_items(path, _split_items(like), step)
  return TrainState(**items["optimizer"], params=items["params"])


def restore_saved_params(path: str, like: Params, step: int | None = None) -> Params:
  """Returns the parameters of a checkpoint by role; see restore_checkpoint.

  Roles that are not in `like` are not read.
  """
  return _restore_items(path, {"params": like}, step)["params"]


def get_latest_step(path: str) -> int | None:
  """Returns the latest step on disk, None if there is none."""
  return max(list_steps(path), default=None)


def list_steps(path: str) -> list[int]:
  """Returns the steps on disk in order."""
  directory = _make_absolute(path)
  if not distributed.on_process_zero(directory.exists):
    return []
  with _open_manager(directory, {}) as manager:
    steps = sorted(manager.all_steps())
  # Processes may see new files of a shared disk at different times.
  return distributed.on_process_zero(lambda: steps)


def _split_items(state: TrainState) -> dict[str, PyTree]:
  return {
    "params": state.params,
    "optimizer": {"step": state.step, "opt_state": state.opt_state},
  }


def _restore_items(
  path: str, like: dict[str, PyTree], step: int | None
) -> dict[str, PyTree]:
  """Restores the items of `like`, and of the parameters only its roles."""
  directory, steps = _make_absolute(path), list_steps(path)
  if step is None:
    step = max(steps, default=None)
  if step not in steps:
    missing = "checkpoint" if step is None else f"step {step}"
    raise FileNotFoundError(f"no {missing} in {directory}; it holds steps {steps}")
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
  )
  with (
    _detect_damage(f"{directory}/{step}"),
    _open_manager(
      directory, {name: ocp.PyTreeCheckpointHandler() for name in like}
    ) as manager,
  ):
    metadata = manager.item_metadata(step)
    saved = {name: metadata[name].tree for name in like}
    roles = like["params"].keys() & saved["params"].keys()
    saved["params"] = {role: saved["params"][role] for role in roles}
    _check_same_arrays(saved, like, where=f"{directory}/{step}")
    args = {
      name: ocp.args.PyTreeRestore(
        tree,
        ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True,
      )
      for name, tree in like.items()
    }
    restored = manager.restore(step, args=ocp.args.Composite(**args))
  _check_finite(restored["params"], folder=f"{directory}/{step}")
  return {name: restored[name] for name in like}


@contextlib.contextmanager
def _detect_damage(folder: str) -> Iterator[None]:
  """Turns errors of Orbax about unreadable files into DamagedCheckpoint."""
  try:
    yield
  except OtherArrays:
    raise
  except Exception as error:
    text = str(error)
    if any(os.strerror(number) in text for number in MACHINE_ERRORS):
      raise
    reason = next(iter(text.splitlines()), type(error).__name__)[:MAX_CAUSE]
    raise DamagedCheckpoint(folder, reason) from error


def _open_manager(
  directory: epath.Path, handlers: dict[str, ocp.CheckpointHandler]
) -> ocp.CheckpointManager:
  """Returns a manager that reads the directory and never changes it."""
  options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
  return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _make_absolute(path: str) -> epath.Path:
  """Makes a path absolute, as Orbax requires; paths of buckets (gs://) are absolute."""
  result = epath.Path(path)
  return result if result.is_absolute() else result.absolute()


def _check_same_arrays(saved: PyTree, like: PyTree, *, where: str) -> None:
  """Raises if shapes or dtypes differ; Orbax would cast without a message."""
  saved, like = _describe_arrays(saved), _describe_arrays(like)
  wrong = [
    f"  {name}: saved {saved.get(name, 'none')}, required {like.get(name, 'none')}"
    for name in sorted(saved.keys() | like.keys())
    if saved.get(name) != like.get(name)
  ]
  if wrong:
    raise OtherArrays(
      f"{where} holds other arrays than the model now has; restore it with the "
      "config that it was saved with:\n" + "\n".join(wrong)
    )


def _check_finite(params: PyTree, *, folder: str) -> None:
  """Raises DamagedCheckpoint if a parameter is not finite."""
  for at, is_finite in jax.tree_util.tree_leaves_with_path(_are_finite(params)):
    if not is_finite:
      name = sharding.format_key_path(at)
      raise DamagedCheckpoint(folder, f"{name} contains NaN or infinity")


@jax.jit
def _are_finite(params: PyTree) -> PyTree:
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def _describe_arrays(tree: PyTree) -> dict[str, str]:
  """Returns the dtype and the shape of each leaf by its path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {sharding.format_key_path(at): f"{x.dtype}{list(x.shape)}" for at, x in leaves}
