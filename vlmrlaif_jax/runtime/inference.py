"""Models and policy weights of a finished workdir, without its data."""

import pathlib
from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Params, join
from vlmrlaif_jax.huggingface.checkpoint_layouts import Config
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.arrays import SAVED
from vlmrlaif_jax.runtime.run import Run


def models(
  config: ConfigDict,
  root: pathlib.Path,
  stage: str,
  note: Callable[[str], None],
  mesh: Mesh | None = None,
) -> tuple[Run, Config]:
  """What the roles need of a run to find a stage's weights: models and their bases,
  no data. And the config of the base that the stage's model has.

  Args:
    mesh: of all devices unless given.
  """
  # Settings that were none when the run was made are as they are by default.
  model = run_lib.default_config()
  model.update(config.model)
  mesh = sharding.make_mesh() if mesh is None else mesh
  load = lambda path, head: run_lib.load(
    model, run_lib.resolve(path), mesh, note, scalar_head=head
  )
  policy, base, settings = load(model.path, False)
  scorer, scorer_base = policy.clone(scalar_head=True), base
  if stage == "rm" and model.scorer_path not in ("", model.path):
    scorer, scorer_base, settings = load(model.scorer_path, True)
  no_data = dict.fromkeys(
    ("tokenizer", "template", "eos", "prompts", "splits", "features")
  )
  run = Run(
    config=config,
    workdir=root,
    mesh=mesh,
    policy=policy,
    scorer=scorer,
    base=base,
    scorer_base=scorer_base,
    arrays=SAVED,
    **no_data,
  )
  return run, settings


def policy_variables(made: Run, stage: str) -> Params:
  """Whole variables of the policy as a stage left it."""
  trained = role_params.policy_of(made, stage)
  if "params" not in trained:  # RL leaves the projector as SFT made it.
    trained = join(role_params.policy_of(made, role_params.SFT[1]), trained)
  return join(made.base, trained)
