"""Tiny models of families other than LLaVA run the stages that train, and are exported.

Log-probabilities, exports and adapters are compared with transformers and PEFT.
"""

import contextlib
import functools
import io
import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from tests.helpers import media, qwen, qwen2_5, small
from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.types import merge_params
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.models import lora
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.runtime import loading, role_params
from vlmrlaif_jax.serving import export

QUIET = lambda line: None
STAGES = ("sft_short", "sft_long", "rm", "ppo", "dpo", "grpo")


class Case(NamedTuple):
  """A family and what differs in its run."""

  write: Callable  # Writes a checkpoint into a folder.
  stages: tuple[str, ...] = STAGES
  settings: dict = {}
  several: bool = False  # Whether records have several videos and images.


LABEL = {
  "label.context": "all", "label.caption_prompt_len": 160, "label.caption_max_new": 6,
  "label.judge_prompt_len": 2048, "label.judge_max_new": 2,
}  # fmt: skip
MERGER = {"model.train_merger": True}
SEVERAL = {"data.prompt_len": 256, "data.response_len": 264, "sft.pack_len": 768}
CASES = {
  "qwen3_vl": Case(qwen.write_checkpoint, settings=SEVERAL | MERGER, several=True),
  "qwen2_5_vl": Case(
    qwen2_5.write_checkpoint, ("sft_short", "sft_long", "label", *STAGES[2:]), LABEL
  ),
}


class Trained(NamedTuple):
  """A run that is done, and its policy."""

  root: object  # Folder with "model" and "run".
  case: Case
  run: object  # Run without data.
  variables: dict  # Of the policy after PPO.


def settings(checkpoint, world):
  changed = {
    "model.template": "chat_template", "data.prompt_len": 128,
    "data.response_len": 192, "sft.pack_len": 512, "ppo.batch_size": 8,
    "dpo.batch_size": 4, "dpo.preferences": str(world / "preferences.jsonl"),
    "grpo.batch_size": 8, "grpo.samples": 2, "rm.steps": 1, "sft.short_steps": 1,
  }  # fmt: skip
  for stage in ("ppo", "dpo", "grpo"):
    changed[f"{stage}.steps"] = 1
    changed[f"{stage}.optimizer.warmup_steps"] = 0
  return small.settings(checkpoint, world) | changed


@pytest.fixture(scope="module", params=CASES)
def trained(request, tiny_world, tmp_path_factory):
  root, case = tmp_path_factory.mktemp("family"), CASES[request.param]
  (root / "model").mkdir()
  case.write(root / "model")
  files = tiny_world
  if case.several:
    media.write_several(tiny_world, root)
    files = root
  given = settings(root / "model", files) | case.settings
  given["data.videos"] = str(tiny_world / "videos")
  config = small.config(given, case.stages)
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    if "label" in case.stages:  # Recipes with given preferences skip it.
      labels = small.config(given, ("sft_short", "sft_long", "label"))
      runner.run_recipe(labels, str(root / "run"))
    runner.run_recipe(config, str(root / "run"))
  (root / "printed.txt").write_text(printed.getvalue())
  run, _ = loading.load_run_without_data(
    config, root / "run", QUIET, has_separate_reward_model=False
  )
  variables = jax.device_get(role_params.load_policy_variables(run, "ppo"))
  return Trained(root, case, run, variables)


def assert_trains(folder):
  """Checks the files of a stage after a step, and its metrics.

  The section `grpo` is that of configs/grpo_rank.py, whose scores are win rates.
  """
  names = {path.name for path in folder.iterdir()}
  assert names >= {"stage.json", "done.json", "metrics.jsonl", "checkpoints"}
  (first, *_) = small.metrics(folder)
  assert first["step"] == 1 and all(np.isfinite(list(first.values())))
  if folder.name in ("ppo", "grpo"):
    assert abs(first["kl"]) < 1e-5 and first["sampler_gap"] < 1e-5
    samples = jsonl.read_jsonl(folder / "samples" / "step_1.jsonl")
    assert samples
  if folder.name == "grpo":  # Of two responses, one wins or none.
    assert {row["score"] for row in samples} == {0, 1} and first["grad_norm"] > 0


def test_all_stages_train(trained):
  for stage in set(trained.case.stages) - {"label"}:
    assert_trains(trained.root / "run" / stage)


def test_no_record_is_skipped(trained):
  printed = (trained.root / "printed.txt").read_text()
  assert "are packed in" in printed and "records skipped" not in printed


def test_the_judge_reads_the_captions_of_all_clips_of_a_video(trained):
  """Clips of two frames are one temporal patch each."""
  if "label" not in trained.case.stages:
    return
  folder, features = (trained.root / "run" / name for name in ("label", "features"))
  captions = jsonl.read_jsonl(folder / "captions.jsonl")
  spans = {}
  for row in captions:
    spans.setdefault(row["video"], []).append((row["start"], row["stop"]))
  for video, own in spans.items():
    time, *_ = json.loads((features / f"{video}.json").read_text())["grid"]
    assert own == [(at, at + 1) for at in range(time)] and time > 1
  said = {row["caption"].strip() for row in captions} - {""}
  rows = jsonl.read_jsonl(folder / "blocks" / "block_00000.jsonl")
  assert any(row["verdicts"] for row in rows)  # Some prompts of the judge fit.
  assert len(said) > 1 and all(any(x in row["narrative"] for x in said) for row in rows)


def test_only_a_merger_in_the_projector_is_trained(trained):
  base = trained.run.base["params"]
  is_trained = "model.train_merger" in trained.case.settings
  assert ("projector" in base) == is_trained
  now = trained.variables["params"]
  for part in ("vision", "llm"):
    jax.tree.map(np.testing.assert_array_equal, now[part], jax.device_get(base[part]))
  if is_trained:
    assert {str(x.dtype) for x in jax.tree.leaves(now["projector"])} == {"float32"}
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), now, jax.device_get(base))
    assert min(jax.tree.leaves(change["projector"])) > 0


def test_reward_model_and_critic_have_the_merger_of_sft(trained):
  params, frozen = role_params.make_ppo_roles(
    trained.run, "reward", has_reward_model=True
  )
  policy = trained.variables["params"].get("projector", {})
  for role in ("policy", "ref", "reward", "critic"):
    whole = merge_params(frozen[role], params.get(role, {}))
    got = jax.device_get(whole["params"].get("projector", {}))
    jax.tree.map(np.testing.assert_array_equal, got, policy)


def test_merged_weights_and_adapters_have_the_logits_of_the_policy(trained):
  root, run = trained.root, trained.run
  for kind in ("merged", "adapter"):
    export.export_stage(
      str(root / "run"), "ppo", str(root / kind), kind=kind, note=QUIET
    )
    assert (root / kind / "video_preprocessor_config.json").exists()
  auto = transformers.AutoModelForImageTextToText
  want = qwen.our_logits(run.policy, trained.variables)
  merged = auto.from_pretrained(root / "merged", dtype=torch.float32).eval()
  np.testing.assert_allclose(qwen.their_logits(merged), want, atol=2e-5)
  base = auto.from_pretrained(root / "model", dtype=torch.float32).eval()
  assert np.abs(qwen.their_logits(base) - want).max() > 1e-4
  adapted = peft.PeftModel.from_pretrained(base, root / "adapter").eval()
  got = qwen.their_logits(adapted.get_base_model())
  np.testing.assert_allclose(got, want, atol=2e-5)
  # Both are read back.
  alpha = run.config.model.lora_alpha
  policy = lora.merge_lora(trained.variables, alpha)["params"]
  is_trained = "model.train_merger" in trained.case.settings
  for kind in ("merged", "adapter"):
    _, found, _ = convert.load_checkpoint(
      root / kind, dtype="float32", train_merger=is_trained
    )
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, found["params"], jax.device_get(policy))
