"""Published layouts run the paper's pipeline, and come back bit by bit.

Through the launcher, with the preset "7b" over a model of random weights. One run
reads all three: a LoRA folder is read with the original LLaVA that it lies over.
"""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from configs import front
from tests.helpers import checkpoints as made
from tests.helpers import several, small
from tools.pretraining import tokenizer
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.runtime import run
from vlmrlaif_jax.serving import export

ROOT = pathlib.Path(__file__).parents[2]
# A recipe with given preferences writes no labels, so they come first.
LABEL = ("sft_short", "sft_long", "label")
STAGES = (*LABEL, "rm", "ppo", "eval")
LIMIT_S = 600  # For a run, on a busy machine.
NAMES = {  # Of the folders -> of their layouts.
  "hf": "Hugging Face LLaVA",
  "original": "original LLaVA",
  "adapter": "LoRA adapter on original LLaVA",
}
# Blocks of NF4 divide these.
SIZES = dict(vocab_size=small.VOCAB, hidden_size=64, intermediate_size=128)
MATRICES = {
  "self_attn.q_proj": (64, 64),
  "self_attn.v_proj": (64, 32),
  "mlp.down_proj": (128, 64),
}
# Of the preset, what is too large for a test; types, prompts and NF4 stay. Captions,
# verdicts and answers have one shape, compiled once, that the judge's prompt fits.
LENGTHS = dict(prompt_len=640, max_new=20)
SMALL = {
  "model.clip_frames": 3,
  "data.prompt_len": LENGTHS["prompt_len"],
  "data.response_len": LENGTHS["max_new"],
  **{f"label.judge_{key}": value for key, value in LENGTHS.items()},
  **{f"label.caption_{key}": value for key, value in LENGTHS.items()},
  "sft.microbatches": 2,
  "ppo.microbatches": 2,
  **dict.fromkeys(("sft.short_steps", "sft.long_steps", "rm.steps", "ppo.steps"), 1),
}


@pytest.fixture(scope="module")
def root(tiny_checkpoint, tmp_path_factory):
  """A folder with one model in three layouts; the adapter changes it."""
  root = tmp_path_factory.mktemp("published")
  words = tokenization.load_tokenizer(tiny_checkpoint)
  with pytest.MonkeyPatch.context() as patch:
    for key, value in SIZES.items():
      patch.setitem(made.LLM, key, value)
    patch.setattr(made, "MATRICES", MATRICES)
    patch.setattr(made, "IMAGE", words.convert_tokens_to_ids(tokenizer.IMAGE))
    model = made.llava()
    model.save_pretrained(root / "hf")
    made.write_tower(root / "tower", model)
    made.write_original(root / "original", model, mm_vision_tower="tower")
    write_three_pieces(root / "adapter", model, root / "original")
  for name in NAMES:
    words.save_pretrained(root / name)
  return root


def write_three_pieces(folder, model, base):
  """LLaVA's LoRA folder: an adapter, the projector trained beside it, a config."""
  made.write_adapter(folder, made.factors(4), base, rank=4)
  projector = made.projector_tensors(model).items()
  rest = {f"base_model.model.{name}": 1.5 * x for name, x in projector}
  torch.save(rest, folder / "non_lora_trainables.bin")
  config = made.original_config(mm_vision_tower="tower")
  (folder / "config.json").write_text(json.dumps(config))


# The pipeline.


@pytest.fixture(scope="module")
def workdir(root, tiny_settings):
  """Of a run whose policy is the adapter on the original, its scorer Hugging Face's."""
  settings = {
    **tiny_settings,
    **SMALL,
    "model.path": root / "adapter",
    "model.reward_model_path": root / "hf",
  }
  for stages in (LABEL, STAGES):
    done = subprocess.run(
      [
        sys.executable, ROOT / "launch" / "run.py", "--config=configs/ppo.py:7b",
        f"--workdir={root / 'run'}", *small.flags(settings | {"stages": stages}),
      ],
      cwd=ROOT, env=several.environment(torch=True), timeout=LIMIT_S,
      capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
  return root / "run"


@pytest.mark.slow
def test_every_stage_is_done(workdir):
  assert [s for s in STAGES if (workdir / s / "done.json").exists()] == list(STAGES)


@pytest.mark.slow
def test_preset_is_kept_but_for_paths_and_sizes(workdir):
  used = json.loads((workdir / "config.json").read_text())["model"]
  preset = front.model_7b().to_dict()
  changed = {key for key, value in used.items() if value != preset[key]}
  sizes = {"frames", "clip_frames", "lora_rank", "sft_lora_rank"}
  assert changed == {"path", "reward_model_path", *sizes}


@pytest.mark.slow
def test_judge_was_asked(workdir):
  done = json.loads((workdir / "label" / "done.json").read_text())
  assert done["summary"]["asked"] > 0


@pytest.mark.slow
def test_report_names_the_layouts(workdir):
  page = (workdir / "report.html").read_text()
  for role, folder in (("policy", "adapter"), ("reward_model", "hf")):
    assert f"<b>{role}</b> {folder}: {NAMES[folder]}; " in page


@pytest.mark.slow
def test_every_stage_that_trains_has_a_finite_gradient(workdir):
  for stage in ("sft_short", "sft_long", "rm", "ppo"):
    rows = small.metrics(workdir / stage)
    assert rows and all(0 < row["grad_norm"] < np.inf for row in rows)


# Reading and writing.


def test_adapter_without_a_config_of_its_own_is_a_checkpoint(tmp_path):
  folder = made.write_adapter(tmp_path / "x", made.factors(4), "base", rank=4)
  assert run.resolve_checkpoint(str(folder)) == folder


@pytest.mark.parametrize("layout", NAMES)
def test_imported_exported_and_imported_again_is_bitwise_the_same(
  root, layout, tmp_path
):
  _, variables, config = convert.load_checkpoint(root / layout, dtype="float32")
  want = variables["params"]
  section = small.config({}).model
  export.write_merged(
    tmp_path, {**variables, "lora": {}}, config, root / layout, section, "float32"
  )
  got = convert.load_checkpoint(tmp_path, dtype="float32")[1]["params"]
  jax.tree.map(np.testing.assert_array_equal, got, want)
