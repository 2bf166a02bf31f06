"""A tiny LLaVA-OneVision runs the stages that train, and is exported for transformers.

SFT trains its merger, too.
"""

import jax
import numpy as np
import pytest
import transformers

from tests.end_to_end.test_families import STAGES, assert_trains, settings
from tests.helpers import onevision, small
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.models import lora
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.runtime import loading, role_params
from vlmrlaif_jax.serving import export


@pytest.fixture(scope="module")
def root(tiny_world, tmp_path_factory):
  root = tmp_path_factory.mktemp("onevision")
  (root / "model").mkdir()
  onevision.write_checkpoint(root / "model")
  given = settings(root / "model", tiny_world) | {"model.train_merger": True}
  runner.run_recipe(small.config(given, STAGES), str(root / "run"))
  return root


def test_stages_train(root):
  for stage in STAGES:
    assert_trains(root / "run" / stage)


def test_an_export_is_read_by_transformers_and_is_the_policy(root):
  export.export_stage(str(root / "run"), "ppo", str(root / "out"))
  kind = transformers.LlavaOnevisionForConditionalGeneration
  hf = kind.from_pretrained(root / "out")
  model, got, _ = convert.load_checkpoint(root / "out", dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, got, onevision.convert(model, hf))
  config = export.ConfigDict(export.read_json(root / "run" / "config.json"))
  run, _ = loading.load_run_without_data(
    config, root / "run", lambda line: None, has_separate_reward_model=False
  )
  variables = role_params.load_policy_variables(run, "ppo")
  want = lora.merge_lora(variables, config.model.lora_alpha)["params"]
  vision = {**want["vision"], **want.pop("projector")}
  want = jax.device_get({**want, "vision": vision})
  jax.tree.map(np.testing.assert_array_equal, got["params"], want)
  assert (root / "out" / "video_preprocessor_config.json").exists()
  _, base, _ = convert.load_checkpoint(root / "model", dtype="float32")
  base = base["params"]["vision"]
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), got["params"]["vision"], base)
  assert min(jax.tree.leaves(change.pop("merger"))) > 0
  assert max(jax.tree.leaves(change)) == 0


def test_an_adapter_cannot_have_a_trained_newline(root, tmp_path):
  with pytest.raises(UserError, match="SFT trains image_newline .* Set --kind=merged"):
    export.export_stage(str(root / "run"), "ppo", str(tmp_path / "out"), kind="adapter")
