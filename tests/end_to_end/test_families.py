"""Tiny models of other families run the stages that train, and are exported."""

import pathlib
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
import pytest
import transformers

from tests.helpers import onevision, qwen, small
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.models import lora
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.runtime import loading, role_params
from vlmrlaif_jax.serving import export

STAGES = ("sft_short", "sft_long", "rm", "ppo", "dpo", "grpo")


def settings(checkpoint, world):
  changed = {
    "model.template": "chat_template", "data.prompt_len": 128,
    "data.response_len": 192, "sft.pack_len": 512, "ppo.batch_size": 8,
    "dpo.batch_size": 4, "dpo.preferences": str(world / "preferences.jsonl"),
    "grpo.batch_size": 8, "grpo.samples": 2, "rm.steps": 1,
  }  # fmt: skip
  for stage in ("ppo", "dpo", "grpo"):
    changed[f"{stage}.steps"] = 1
    changed[f"{stage}.optimizer.warmup_steps"] = 0
  return small.settings(checkpoint, world) | changed


FAMILIES = {  # Name -> (helper, class of transformers, settings).
  "qwen3_vl": (qwen, transformers.Qwen3VLForConditionalGeneration, {}),
  "llava_onevision": (
    onevision,
    transformers.LlavaOnevisionForConditionalGeneration,
    {"model.train_merger": True},
  ),
}


class MadeRun(NamedTuple):
  """A run of all stages with a checkpoint of transformers."""

  helper: ModuleType
  kind: type  # Class of transformers.
  root: pathlib.Path  # Folder of the checkpoint and of the run.


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tiny_world, tmp_path_factory):
  helper, kind, more = FAMILIES[request.param]
  root = tmp_path_factory.mktemp(request.param)
  (root / "model").mkdir()
  helper.write_checkpoint(root / "model")
  config = small.config(settings(root / "model", tiny_world) | more, STAGES)
  runner.run_recipe(config, str(root / "run"))
  return MadeRun(helper, kind, root)


def test_stages_train(made):
  for stage in STAGES:
    (first, *_) = small.metrics(made.root / "run" / stage)
    assert first["step"] == 1 and all(np.isfinite(list(first.values()))), stage


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_log_probabilities_of_sampling_are_those_of_training(made, stage):
  (first, *_) = small.metrics(made.root / "run" / stage)
  assert abs(first["kl"]) < 1e-5


def test_an_export_is_read_by_transformers_and_is_the_policy(made):
  root = made.root
  export.export_stage(str(root / "run"), "ppo", str(root / "out"))
  hf = made.kind.from_pretrained(root / "out")
  model, got, _ = convert.load_llava(root / "out", dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, got, made.helper.convert(model, hf))
  config = export.ConfigDict(export.read_json(root / "run" / "config.json"))
  run, _ = loading.load_run_without_data(
    config, root / "run", lambda line: None, has_separate_reward_model=False
  )
  variables = role_params.load_policy_variables(run, "ppo")
  want = lora.merge_lora(variables, config.model.lora_alpha)["params"]
  vision = {**want["vision"], **want.pop("projector", {})}  # It may have the merger.
  want = jax.device_get({**want, "vision": vision})
  jax.tree.map(np.testing.assert_array_equal, got["params"], want)
  assert (root / "out" / "video_preprocessor_config.json").exists()


def test_sft_trains_the_merger(made):
  """Unless it is a part of the tower, which no stage changes."""
  _, got, _ = convert.load_llava(made.root / "out", dtype="float32")
  _, base, _ = convert.load_llava(made.root / "model", dtype="float32")
  change = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), got["params"]["vision"], base["params"]["vision"]
  )
  merger = change.pop("merger")
  assert max(jax.tree.leaves(change)) == 0
  is_trained = made.helper is onevision
  assert all((x > 0) == is_trained for x in jax.tree.leaves(merger))


def test_an_adapter_cannot_have_a_trained_newline(made, tmp_path):
  if made.helper is onevision:
    with pytest.raises(UserError, match="SFT trains image_newline"):
      export.export_stage(
        str(made.root / "run"), "ppo", str(tmp_path / "out"), kind="adapter"
      )
