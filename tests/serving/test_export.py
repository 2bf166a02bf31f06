"""What is exported is the model that was trained, as transformers and PEFT know it."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from tests.helpers import several, small
from tests.helpers.rows import text_batch
from tests.methods.roles import noisy
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import VIDEO_TOKEN, TrainState
from vlmrlaif_jax.huggingface import convert, peft_adapters
from vlmrlaif_jax.models import lora
from vlmrlaif_jax.runtime import loading, role_params
from vlmrlaif_jax.sampling.generate import generate
from vlmrlaif_jax.serving import export
from vlmrlaif_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
QUIET = lambda line: None
IMAGE = 5  # Any id can stand for an image in ours.


def save(run, stage, params):
  state = TrainState(jnp.int32(1), params, jnp.zeros(1))
  checkpoint.save_train_state(
    str(run.workdir / stage / "checkpoints"), state, 1, keep=1
  )


@pytest.fixture(scope="module")
def base(tiny_checkpoint, tmp_path_factory):
  """A checkpoint whose embeddings are not so small that norms amplify rounding."""
  folder = tmp_path_factory.mktemp("base")
  shutil.copytree(tiny_checkpoint, folder, dirs_exist_ok=True)
  _, variables, config = convert.load_checkpoint(tiny_checkpoint, dtype="float32")
  params = variables["params"]
  params["llm"]["embed"]["embedding"] *= 20
  params["projector"]["linear_2"]["kernel"] *= 20
  convert.save_checkpoint(folder, params, config, "float32")
  return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
  """A workdir whose SFT policy and reward model have random weights."""
  root = tmp_path_factory.mktemp("export")
  given = {"model.path": str(base), "model.lora_rank": 2}
  config = small.config(given)
  (root / "config.json").write_text(config.to_json_best_effort())
  made, _ = loading.load_run_without_data(
    config, root, QUIET, has_separate_reward_model=True
  )
  save(made, "sft_long", {"policy": noisy(role_params.init_policy(made), 1, 0.04)})
  save(made, "rm", {"reward": noisy(role_params.init_reward_model(made), 2, 0.04)})
  return made


@pytest.fixture(scope="module")
def variables(run):
  return role_params.load_policy_variables(run, "sft_long")


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
  """The folder of the merged policy, and the lines that were told."""
  out, lines = tmp_path_factory.mktemp("out") / "merged", []
  export.export_stage(
    str(run.workdir), "sft_long", str(out), dtype="float32", note=lines.append
  )
  return out, lines


@pytest.fixture(scope="module")
def hf(merged):
  return transformers.LlavaForConditionalGeneration.from_pretrained(merged[0]).eval()


def prompts(count, image):
  """Images with questions of unequal lengths: pixels, tokens, mask."""
  rng = np.random.default_rng(0)
  tokens, mask = np.zeros((count, 30), int), np.zeros((count, 30), bool)
  for i in range(count):
    row = [1, *[image] * 16, *rng.integers(5, 500, rng.integers(3, 12))]
    tokens[i, -len(row) :], mask[i, -len(row) :] = row, True
  return rng.normal(size=(count, 16, 16, 3)).astype(np.float32), tokens, mask


def as_ours(pixels, tokens, mask, image):
  tokens = np.where(tokens == image, VIDEO_TOKEN, tokens)
  return text_batch(*map(jnp.asarray, (pixels[:, None], tokens, mask, mask)))


def as_theirs(pixels, tokens, mask):
  return {
    "pixel_values": torch.tensor(np.moveaxis(pixels, -1, 1)),
    "input_ids": torch.tensor(tokens),
    "attention_mask": torch.tensor(mask).long(),
  }


def test_logits_equal_those_of_the_trained_policy(run, variables, hf):
  given = prompts(3, hf.config.image_token_id)
  got = jax.jit(run.policy.apply)(variables, as_ours(*given, hf.config.image_token_id))
  positions = torch.tensor(np.maximum(np.cumsum(given[2], 1) - 1, 0))
  with torch.no_grad():
    want = hf(**as_theirs(*given), position_ids=positions).logits.numpy()
  plain = jax.jit(run.policy.apply)(run.base, as_ours(*given, hf.config.image_token_id))
  assert np.abs(plain - got).max() > 0.1  # Or nothing would have been merged.
  np.testing.assert_allclose(got[given[2]], want[given[2]], atol=2e-5)


def test_greedy_answers_are_the_same(run, variables, hf):
  given = prompts(20, hf.config.image_token_id)
  hf.generation_config.eos_token_id = hf.generation_config.suppress_tokens = None
  want = hf.generate(
    **as_theirs(*given), do_sample=False, max_new_tokens=64, pad_token_id=0
  )
  ask = jax.jit(
    lambda variables, batch: generate(
      run.policy,
      variables,
      batch,
      jax.random.key(0),
      max_new=64,
      temperature=0.0,
      stops=(-5,),
      pad=0,
    )
  )
  got = ask(variables, as_ours(*given, hf.config.image_token_id)).batch.tokens[:, 30:]
  assert len(np.unique(got)) > 20  # Or a constant model would pass.
  np.testing.assert_array_equal(got, want[:, 30:].numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_load_in_the_type_that_was_exported(run, tmp_path, dtype):
  out = tmp_path / "out"
  export.export_stage(str(run.workdir), "sft_long", str(out), dtype=dtype, note=QUIET)
  model = transformers.AutoModelForImageTextToText.from_pretrained(out)
  assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}


def test_processor_and_tokenizer_load(merged):
  processor = transformers.AutoProcessor.from_pretrained(merged[0])
  images = np.zeros((16, 16, 3), np.uint8)
  out = processor(images=images, text="USER: <image>\nWhat?", return_tensors="np")
  assert (out["input_ids"] == processor.image_token_id).sum() == 16
  assert (merged[0] / "generation_config.json").exists()


def test_command_names_the_file_that_says_how_to_use_it(merged):
  assert any("See its README.md" in line for line in merged[1])
  assert "vllm serve" in (merged[0] / "README.md").read_text()
  assert any("Hugging Face LLaVA" in line for line in merged[1])


def test_card_is_one_of_the_hub_and_names_base_and_rank(merged, run):
  card = ModelCard.load(merged[0] / "README.md")
  assert card.data.library_name == "transformers"
  assert f"Base: `{run.config.model.path}`. LoRA of rank 2" in card.text


# Adapters.


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory):
  out = tmp_path_factory.mktemp("out") / "adapter"
  export.export_stage(
    str(run.workdir), "sft_long", str(out), kind="adapter", note=QUIET
  )
  return out


def test_adapter_names_modules_of_transformers(adapter, hf):
  modules = dict(hf.named_modules())
  targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
  taken = {name for name in modules if re.fullmatch(targets, name)}
  named = {
    name.removeprefix("base_model.model.").rsplit(".lora_")[0]
    for name in load_file(adapter / "adapter_model.safetensors")
    if "lora_" in name
  }
  assert named == taken and len(taken) == 14


def test_adapter_on_its_base_is_the_merged_model(run, adapter, merged):
  folded = convert.load_checkpoint(adapter, dtype="float32")[1]
  whole = convert.load_checkpoint(merged[0], dtype="float32")[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), folded, whole)


def test_reward_model_keeps_its_head(run, tmp_path):
  export.export_stage(
    str(run.workdir), "rm", str(tmp_path / "rm"), kind="adapter", note=QUIET
  )
  want = jax.device_get(role_params.load_reward_model(run))
  head = load_file(tmp_path / "rm" / "reward_head.safetensors")
  np.testing.assert_array_equal(head["weight"].T, want["params"]["head"]["kernel"])
  np.testing.assert_array_equal(head["bias"], want["params"]["head"]["bias"])
  factors = load_file(tmp_path / "rm" / "adapter_model.safetensors")
  assert set(lora.UPDATES) <= set(want)  # That of SFT, and its own.
  joined = lora.join_lora(want, run.config.model.lora_alpha)["llm"]
  for name, factor in peft_adapters.convert_to_peft(jax.device_get(joined)).items():
    ours = name.replace(".model.layers", ".model.language_model.layers")
    np.testing.assert_array_equal(factors[ours], factor)


def test_quantised_base_is_exported_as_it_was_trained_on(run, merged, tmp_path):
  root, out = tmp_path / "run", tmp_path / "out"
  shutil.copytree(run.workdir, root)
  config = run.config.copy_and_resolve_references()
  config.model.quant = "int8"
  (root / "config.json").write_text(config.to_json_best_effort())
  export.export_stage(str(root), "sft_long", str(out), note=QUIET)
  given = as_ours(*prompts(2, IMAGE), IMAGE)
  made, _ = loading.load_run_without_data(
    config, root, QUIET, has_separate_reward_model=False
  )
  trained = role_params.load_policy_variables(made, "sft_long")
  assert "quant" in trained
  exported = convert.load_checkpoint(out, dtype="float32")[1]
  not_quantised = convert.load_checkpoint(merged[0], dtype="float32")[1]
  apply = jax.jit(run.policy.apply)
  want, got, plain = (
    apply(variables, given)[given.mask]
    for variables in (trained, exported, not_quantised)
  )
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert np.abs(plain - want).max() > 1e-3


# What is refused.


def test_stage_that_was_not_run_is_named(run, tmp_path):
  with pytest.raises(UserError, match="no checkpoint in .*ppo"):
    export.export_stage(str(run.workdir), "ppo", str(tmp_path / "x"), note=QUIET)


def test_program_names_a_link_out_of_the_checkpoint(base, tmp_path):
  stranger = shutil.copytree(base, tmp_path / "stranger")
  (stranger / "generation_config.json").symlink_to("/proc/self/environ")
  config = small.config({"model.path": str(stranger), "model.lora_rank": 2})
  (tmp_path / "config.json").write_text(config.to_json_best_effort())
  done = subprocess.run(
    [
      sys.executable, ROOT / "launch" / "export.py", f"--workdir={tmp_path}",
      "--stage=sft_long", f"--out={tmp_path / 'out'}",
    ],
    env=several.environment(torch=True), capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2
  assert "generation_config.json is a link to /proc/" in done.stderr
  assert not (tmp_path / "out").exists()


def test_folder_that_holds_something_is_left_alone(run, merged):
  with pytest.raises(ValueError, match="is not empty"):
    export.export_stage(str(run.workdir), "sft_long", str(merged[0]), note=QUIET)


def test_workdir_without_a_run_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="has no config.json"):
    export.export_stage(str(tmp_path), "ppo", str(tmp_path / "x"), note=QUIET)


# A checkpoint without a token for images.


def test_added_token_leaves_the_others_as_they_are(variables):
  config = {"image_token_index": 514, "text_config": {"vocab_size": 512}}
  params, wide = export.add_image_token(variables["params"], config)
  llm, old = params["llm"], variables["params"]["llm"]
  assert wide["text_config"]["vocab_size"] == 515
  rows, head = llm["embed"]["embedding"], llm["lm_head"]["kernel"]
  np.testing.assert_array_equal(rows[:512], old["embed"]["embedding"])
  np.testing.assert_array_equal(head[:, :512], old["lm_head"]["kernel"])
  np.testing.assert_array_equal(head[:, 514], head[:, 0])
