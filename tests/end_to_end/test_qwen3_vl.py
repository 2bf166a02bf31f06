"""A tiny Qwen3-VL runs the stages that train, and is exported for transformers.

Some of its records have several videos and an image, at places within the conversation.
"""

import contextlib
import io

import jax
import numpy as np
import pytest
import transformers

from tests.helpers import media, qwen, small
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.models import lora
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.runtime import loading, role_params
from vlmrlaif_jax.serving import export

STAGES = ("sft_short", "sft_long", "rm", "ppo", "dpo", "grpo")


def settings(checkpoint, world, data):
  changed = {
    "model.template": "chat_template", "data.prompt_len": 256,
    "data.response_len": 264, "sft.pack_len": 768, "ppo.batch_size": 8,
    "data.videos": str(world / "videos"),
    "dpo.batch_size": 4, "dpo.preferences": str(data / "preferences.jsonl"),
    "grpo.batch_size": 8, "grpo.samples": 2, "rm.steps": 1,
  }  # fmt: skip
  for stage in ("ppo", "dpo", "grpo"):
    changed[f"{stage}.steps"] = 1
    changed[f"{stage}.optimizer.warmup_steps"] = 0
  return small.settings(checkpoint, data) | changed


@pytest.fixture(scope="module")
def root(tiny_world, tmp_path_factory):
  root = tmp_path_factory.mktemp("qwen")
  (root / "model").mkdir()
  qwen.write_checkpoint(root / "model")
  media.write_several(tiny_world, root)
  config = small.config(settings(root / "model", tiny_world, root), STAGES)
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    runner.run_recipe(config, str(root / "run"))
  (root / "printed.txt").write_text(printed.getvalue())
  return root


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains(root, stage):
  (first, *_) = small.metrics(root / "run" / stage)
  assert first["step"] == 1 and all(np.isfinite(list(first.values())))


def test_no_record_is_skipped(root):
  printed = (root / "printed.txt").read_text()
  assert "are packed in" in printed and "skipped" not in printed


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_log_probabilities_of_sampling_are_those_of_training(root, stage):
  (first, *_) = small.metrics(root / "run" / stage)
  assert abs(first["kl"]) < 1e-5


def test_an_export_is_read_by_transformers_and_is_the_policy(root, tiny_world):
  export.export_stage(str(root / "run"), "ppo", str(root / "out"))
  hf = transformers.Qwen3VLForConditionalGeneration.from_pretrained(root / "out")
  _, got, _ = convert.load_llava(root / "out", dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, got, qwen.convert(qwen_model(root), hf))
  config = export.ConfigDict(export.read_json(root / "run" / "config.json"))
  run, _ = loading.load_run_without_data(
    config, root / "run", lambda line: None, has_separate_reward_model=False
  )
  variables = role_params.load_policy_variables(run, "ppo")
  want = lora.merge_lora(variables, config.model.lora_alpha)["params"]
  jax.tree.map(np.testing.assert_array_equal, got["params"], jax.device_get(want))
  assert (root / "out" / "video_preprocessor_config.json").exists()


def qwen_model(root):
  return convert.load_llava(root / "model", dtype="float32")[0]
