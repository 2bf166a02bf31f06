"""The base models' recipe, at a few steps."""

import shutil

import jax
import numpy as np
import pytest

from configs import pretrain as recipe
from tools.pretraining import llava_base, program
from tools.pretraining.base import PHASES
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.report.files import list_report_stages, read_stage_facts
from vlmrlaif_jax.runtime import run

SHIPPED = run.resolve_checkpoint("builtin:tiny")


def config():
  made = recipe.get_config("small")
  made.videos = 12
  for name in PHASES:
    made[name].update(steps=1, batch_size=2)
    made[name].optimizer.warmup_steps = 0
  return made


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """The weights of a small base after a step of each phase, and where they lie."""
  folder = tmp_path_factory.mktemp("small")
  shutil.copytree(SHIPPED, folder / "export/llava")  # To learn a tokenizer takes long.
  program.run(config(), str(folder))
  _, variables, _ = convert.load_checkpoint(folder / "export/llava", dtype="float32")
  return folder, variables["params"]


def test_a_report_finds_the_phases(exported):
  folder, _ = exported
  assert list_report_stages(folder) == list(PHASES)
  titles = [read_stage_facts(folder, phase).title for phase in PHASES]
  assert titles == list(program.TITLES)


def test_a_base_of_given_towers_has_them_as_they_were(exported):
  _, params = exported
  _, variables, _ = convert.load_checkpoint(SHIPPED, dtype="float32")
  towers = params["vision"], variables["params"]["vision"]
  jax.tree.map(np.testing.assert_array_equal, *towers)


def test_a_base_of_given_towers_learns_to_read_them(exported):
  again = config()
  model, both = llava_base.make_models(again.model, again.model.vocab)
  before = llava_base.init_params(model, both, jax.random.key(again.seed), again.model)[
    "vlm"
  ]
  _, params = exported
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), params["projector"], before["projector"]
  )
  assert min(jax.tree.leaves(moved)) > 1e-4


def test_towers_of_other_sizes_are_refused(exported):
  folder, _ = exported
  other = config()
  other.model.vision.layers = 2
  with pytest.raises(ValueError, match="has a CLIP of other sizes than model.vision"):
    program.run(other, str(folder))
