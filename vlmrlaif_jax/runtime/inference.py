"""Models and policy weights of a finished workdir, without its data."""

import pathlib
from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.types import Params, join
from vlmrlaif_jax.data import features, pipeline, tokenization
from vlmrlaif_jax.data.prompts import STYLES
from vlmrlaif_jax.huggingface import checkpoint_layouts
from vlmrlaif_jax.huggingface.checkpoint_layouts import Config
from vlmrlaif_jax.models import vlm
from vlmrlaif_jax.runtime import role_params
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.run import Run


def models(
  config: ConfigDict,
  root: pathlib.Path,
  stage: str,
  note: Callable[[str], None],
  mesh: Mesh | None = None,
) -> tuple[Run, Config]:
  """Loads the models of a run and their tokenizer, without data.

  Args:
    config: the settings of the run.
    root: the workdir.
    stage: the stage whose weights are needed.
    note: receives lines about what was loaded.
    mesh: of all devices unless given.

  Returns:
    The run, and the config of the base that the stage's model has.
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
  folder = run_lib.resolve(config.model.path)
  run = without_data(config, root, mesh, policy, base, folder)
  return run._replace(scorer=scorer, scorer_base=scorer_base), settings


def without_data(
  config: ConfigDict,
  workdir: pathlib.Path,
  mesh: Mesh,
  policy: vlm.VLM,
  base: Params,
  folder: pathlib.Path,
) -> Run:
  """Returns a run with the models and the tokenizer of one checkpoint, without data.

  Args:
    config: its section "model" names the template and the prompts.
    workdir: the folder of the run.
    mesh: the mesh that the parameters are on.
    policy: the model.
    base: variables of the model.
    folder: the checkpoint that the tokenizer is from.
  """
  tokenizer = tokenization.load_tokenizer(checkpoint_layouts.tokenizer_folder(folder))
  template = tokenization.template_named(config.model.template)
  return Run(
    config=config,
    workdir=workdir,
    mesh=mesh,
    policy=policy,
    scorer=policy.clone(scalar_head=True),
    base=base,
    scorer_base=base,
    tokenizer=tokenizer,
    template=template,
    eos=tokenization.end_id(tokenizer, template),
    prompts=STYLES[config.model.prompts],
    splits=pipeline.Splits([], [], [], [], []),
    features=features.Store({}, {}, {}),
  )


def policy_variables(made: Run, stage: str) -> Params:
  """Whole variables of the policy as a stage left it."""
  trained = role_params.policy_of(made, stage)
  if "params" not in trained:  # RL leaves the projector as SFT made it.
    trained = join(role_params.policy_of(made, role_params.SFT[1]), trained)
  return join(made.base, trained)
