"""A tiny SmolVLM2 runs the stages that train, and is exported for transformers.

SFT trains its merger, too.
"""

import jax
import numpy as np
import peft
import pytest
import transformers
from flax.traverse_util import flatten_dict

from tests.end_to_end.test_families import STAGES, assert_trains, settings
from tests.helpers import small, smolvlm
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.huggingface.param_mapping import convert_from_hf
from vlmrlaif_jax.models.smolvlm import HF
from vlmrlaif_jax.models.vlm import get_param_shapes
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.serving import export

MERGER = "vision/merger/kernel"


@pytest.fixture(scope="module")
def root(tiny_world, tmp_path_factory):
  root = tmp_path_factory.mktemp("smolvlm")
  (root / "model").mkdir()
  smolvlm.write_checkpoint(root / "model")
  given = settings(root / "model", tiny_world)
  config = small.config(given, STAGES, data__prompt_len=256, model__train_merger=True)
  runner.run_recipe(config, str(root / "run"))
  return root


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains(root, stage):
  assert_trains(root / "run" / stage)


def test_an_export_is_read_by_transformers(root):
  export.export_stage(str(root / "run"), "ppo", str(root / "out"))
  hf = transformers.SmolVLMForConditionalGeneration.from_pretrained(root / "out")
  model, got, _ = convert.load_checkpoint(root / "out", dtype="float32")
  tensors = {name: x.numpy() for name, x in hf.state_dict().items()}
  want = convert_from_hf(HF, tensors, get_param_shapes(model))
  jax.tree.map(np.testing.assert_array_equal, got["params"], want)
  _, base, _ = convert.load_checkpoint(root / "model", dtype="float32")
  ours, before = (flatten_dict(x["params"], sep="/") for x in (got, base))
  changed = {path for path, x in ours.items() if (x != before[path]).any()}
  assert {path for path in changed if path.startswith("vision")} == {MERGER}
  assert "llm/blocks/q/kernel" in changed
  assert (root / "out" / "preprocessor_config.json").exists()


def test_an_adapter_on_its_base_is_the_export(root):
  export.export_stage(str(root / "run"), "ppo", str(root / "adapter"), kind="adapter")
  export.export_stage(str(root / "run"), "ppo", str(root / "merged"))
  kind = transformers.SmolVLMForConditionalGeneration
  base = kind.from_pretrained(root / "model")
  merged = peft.PeftModel.from_pretrained(base, root / "adapter").merge_and_unload()
  got, want = merged.state_dict(), kind.from_pretrained(root / "merged").state_dict()
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, atol=1e-6, err_msg=name)
