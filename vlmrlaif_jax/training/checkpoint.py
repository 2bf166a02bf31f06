"""Saving and restoring a TrainState. The one file that knows orbax.

A checkpoint is a directory PATH/STEP of two items: `params`, and `optimizer`, the rest
of the TrainState. So a later stage reads the parameters without knowing the optimiser.

All processes save and restore together, each its own shards; the folder is on a file
system that they share. They may be others, on another mesh, than those that saved.

Saving waits until the files are whole. What is trained is small beside the frozen
weights, which are not saved, so the wait is short; and a step that was reported
as saved is never lost to a kill.
"""

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from vlmrlaif_jax.core import distributed, sharding
from vlmrlaif_jax.core.types import Params, TrainState


def save_checkpoint(path: str, state: TrainState, step: int, *, keep: int) -> None:
  """Writes PATH/STEP, whole or not at all, and removes all but the latest `keep`.

  Every process calls this, each with its shards of the same state.

  Args:
    keep: how many steps stay, this one among them.
  """
  if keep < 1:
    raise ValueError(f"keep must be 1 or more checkpoints, not {keep}")
  directory = _absolute(path)
  options = ocp.CheckpointManagerOptions(
    preservation_policy=ocp.checkpoint_managers.LatestN(keep),
    enable_async_checkpointing=False,
    cleanup_tmp_directories=True,  # What a process that was killed left behind.
  )
  items = ocp.args.Composite(
    **{name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
  )
  with ocp.CheckpointManager(directory, options=options) as manager:
    if step in manager.all_steps():
      raise ValueError(
        f"{directory} already holds step {step}: resume from it, remove it, "
        "or save elsewhere"
      )
    # force: save also where a later step is there, which orbax would quietly skip.
    manager.save(step, args=items, force=True)


def restore_checkpoint(
  path: str, like: TrainState, step: int | None = None
) -> TrainState:
  """The state that was saved, at a step or else at the latest.

  Args:
    like: arrays or ShapeDtypeStructs. What is restored has their shardings, which
      may be of another mesh than the one it was saved from.

  Raises:
    FileNotFoundError: there is no such checkpoint.
    ValueError: it holds other arrays than `like` does.
  """
  items = _restore_items(path, _items(like), step)
  return TrainState(**items["optimizer"], params=items["params"])


def restore_saved_params(path: str, like: Params, step: int | None = None) -> Params:
  """Only these parameters of a checkpoint, by role; otherwise as restore.

  Roles that the checkpoint has and `like` has not are not read.
  """
  return _restore_items(path, {"params": like}, step)["params"]


def get_latest_step(path: str) -> int | None:
  """The last step that was saved whole; None where there is none."""
  return max(list_steps(path), default=None)


def list_steps(path: str) -> list[int]:
  """The steps that were saved whole and are kept, in order."""
  directory = _absolute(path)
  if not distributed.on_process_zero(directory.exists):
    return []
  with _reader(directory, {}) as manager:
    steps = sorted(manager.all_steps())
  # A shared disk may show them at different times.
  return distributed.on_process_zero(lambda: steps)


def _items(state: TrainState) -> dict[str, PyTree]:
  return {
    "params": state.params,
    "optimizer": {"step": state.step, "opt_state": state.opt_state},
  }


def _restore_items(
  path: str, like: dict[str, PyTree], step: int | None
) -> dict[str, PyTree]:
  """The items that `like` names; of the parameters, the roles that it names."""
  directory, steps = _absolute(path), list_steps(path)
  if step is None:
    step = max(steps, default=None)
  if step not in steps:
    wanted = "checkpoint" if step is None else f"step {step}"
    raise FileNotFoundError(f"no {wanted} in {directory}; it holds steps {steps}")
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
  )
  with _reader(
    directory, {name: ocp.PyTreeCheckpointHandler() for name in like}
  ) as manager:
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
  return {name: restored[name] for name in like}


def _reader(
  directory: epath.Path, handlers: dict[str, ocp.CheckpointHandler]
) -> ocp.CheckpointManager:
  """A manager that leaves the directory as it is."""
  options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
  return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _absolute(path: str) -> epath.Path:
  """orbax wants absolute paths; those of a bucket (gs://) are already."""
  given = epath.Path(path)
  return given if given.is_absolute() else given.absolute()


def _check_same_arrays(saved: PyTree, like: PyTree, *, where: str) -> None:
  """Refuses what orbax would cast in silence or answer with a page of its insides."""
  saved, like = _shapes(saved), _shapes(like)
  wrong = [
    f"  {name}: saved {saved.get(name, 'none')}, wanted {like.get(name, 'none')}"
    for name in sorted(saved.keys() | like.keys())
    if saved.get(name) != like.get(name)
  ]
  if wrong:
    raise ValueError(
      f"{where} holds other arrays than the model now has; restore it with the "
      "config it was saved with:\n" + "\n".join(wrong)
    )


def _shapes(tree: PyTree) -> dict[str, str]:
  """Path -> dtype and shape, of every leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {sharding.format_key_path(at): f"{x.dtype}{list(x.shape)}" for at, x in leaves}
