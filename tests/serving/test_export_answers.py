"""An export answers as its policy: greedy texts of a workdir, our chat, transformers.

The weights are random, and large enough that an answer depends on every token.
"""

from typing import NamedTuple

import peft
import pytest
import torch
import transformers

from tests.helpers import chats, exports, small, stage_runs
from tests.helpers import checkpoints as made
from tests.methods.roles import noisy
from vlmrlaif_jax.runtime import loading, role_params, run
from vlmrlaif_jax.serving import chat_clip, chat_session, chat_stream, export
from vlmrlaif_jax.serving.chat_clip import ClipLimits
from vlmrlaif_jax.serving.chat_stream import ChatQuestion

MAX_NEW = 24
LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
QUIET = lambda line: None
# Language model, tower, tokenizer, template.
FAMILIES = [
  ("llama", "clip", "llama", "vicuna_v1"),
  ("llama", "siglip", "new_llama", "llava_v1"),
  ("llama", "clip", "llama_without_bos", "brief"),
  ("llama", "clip", "llama_of_v0", "llava_v0"),
  ("llama", "clip", "new_llama_without_bos", "chat_template"),
  ("llama 3", "clip", "new_llama", "llava_v1"),
  ("mistral", "clip", "llama", "vicuna_v1"),
  ("qwen2", "clip", "qwen", "qwen"),
  ("qwen2", "siglip", "qwen_with_idle_bos", "chat_template"),
  ("qwen3", "clip", "qwen_with_idle_bos", "qwen"),
  ("qwen3", "siglip", "qwen", "chat_template"),
]
HISTORY = [("What is the ring doing?", "It moves left."), ("Is it red?", "Yes.")]
QUESTION = "What happens next?"


class Exported(NamedTuple):
  """A workdir and the exports of its policy."""

  workdir: str
  folders: dict  # Kind -> folder.


def write_base(folder, text, vision, tokenizer):
  """A LLaVA of transformers with a tokenizer, whose matrices have rows to spare."""
  exports.write_tokenizer(folder, tokenizer)
  words = len(exports.read_tokenizer(folder))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(made.LLM, "vocab_size", words + 9)
    # The tokenizers without <image> receive it as their next id.
    ids = exports.read_tokenizer(folder).get_vocab()
    patch.setattr(made, "IMAGE", ids.get("<image>", words))
    family, rope = ("llama", LLAMA3) if text == "llama 3" else (text, None)
    made.llava(family, vision, rope).save_pretrained(folder)
  return folder


def make_workdir(base, root, template, frames=1):
  """A run of a checkpoint whose SFT policy has random LoRA factors."""
  given = {"model.path": str(base), "model.template": template}
  config = small.config({**given, "model.frames": frames, "model.lora_rank": 2})
  root.mkdir()
  (root / "config.json").write_text(config.to_json_best_effort())
  opened, _ = loading.load_run_without_data(
    config, root, QUIET, has_separate_reward_model=False
  )
  policy = noisy(role_params.init_policy(opened), 1, 0.1)
  stage_runs.save(opened, "sft_long", {"policy": policy})
  return root


@pytest.fixture(scope="module", params=FAMILIES, ids=".".join)
def exported(request, tmp_path_factory):
  text, vision, tokenizer, template = request.param
  root = tmp_path_factory.mktemp("answers")
  base = write_base(root / "base", text, vision, tokenizer)
  workdir = str(make_workdir(base, root / "run", template))
  folders = {kind: root / kind for kind in ("merged", "adapter")}
  for kind, folder in folders.items():
    export.export_stage(workdir, "sft_long", str(folder), kind=kind, note=QUIET)
  return Exported(workdir, folders)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """A clip of one frame, and that frame."""
  path = tmp_path_factory.mktemp("clip") / "clip.mp4"
  (frame,) = exports.write_clip(path, 1)
  return path, frame


def answer(chat, path, history=()):
  """The greedy answer of a chat's only policy."""
  (name,) = chat.policies
  features = chat_clip.read_clips(chat, [path], ClipLimits())
  asked = ChatQuestion(QUESTION, max_tokens=MAX_NEW)
  *_, last = chat_stream.stream_answer(chat, name, features, history, asked)
  return last.texts[0]


def open_export(folder, frames=1):
  model = run.default_config()
  model.update(
    template="", prompts="brief", frames=frames, clip_frames=1, lora_rank=0,
    lora_alpha=1.0,
  )  # fmt: skip
  return chat_session.open_model(
    str(folder), model, chats.mesh(), max_prompt=256, note=QUIET
  )


def open_workdir(workdir):
  return chat_session.open_chat_workdir(
    workdir, chats.mesh(), max_prompt=256, note=QUIET
  )


def open_theirs(folder):
  auto = transformers.AutoModelForImageTextToText
  return auto.from_pretrained(folder, dtype=torch.float32).eval()


def test_texts_of_workdir_chat_and_transformers_are_equal(exported, clip):
  path, frame = clip
  folder = exported.folders["merged"]
  ours, here = open_workdir(exported.workdir), open_export(folder)
  theirs = open_theirs(folder)
  for history in ((), HISTORY):
    want = answer(ours, path, history)
    messages = exports.make_messages([*history, (QUESTION, None)], frame)
    inputs = exports.their_inputs(folder, messages)
    assert len(want) > 9  # Or a model that says nothing would pass.
    assert answer(here, path, history) == want
    assert exports.their_answer(folder, theirs, inputs, MAX_NEW) == want


# Adapters.


def test_text_of_an_adapter_by_peft_is_that_of_the_merged_model(exported, clip):
  frame = clip[1]
  messages = exports.make_messages([*HISTORY, (QUESTION, None)], frame)
  want, got = (
    exports.their_answer(folder, model, exports.their_inputs(folder, messages), MAX_NEW)
    for folder, model in (
      (exported.folders["merged"], open_theirs(exported.folders["merged"])),
      (exported.folders["adapter"], open_adapter(exported.folders["adapter"])),
    )
  )
  assert got == want != ""


def open_adapter(folder):
  """The adapter on its base, with its own settings of generation."""
  base = peft.PeftConfig.from_pretrained(folder).base_model_name_or_path
  model = peft.PeftModel.from_pretrained(open_theirs(base), folder).eval()
  settings = transformers.GenerationConfig.from_pretrained(folder)
  model.base_model.model.generation_config = settings
  return model


# Videos.


def test_text_about_a_video_is_that_of_the_code_on_the_card(tmp_path):
  base = write_base(tmp_path / "base", "qwen3", "clip", "qwen")
  workdir = make_workdir(base, tmp_path / "run", "qwen", frames=3)
  folder = tmp_path / "out"
  export.export_stage(str(workdir), "sft_long", str(folder), note=QUIET)
  path = tmp_path / "clip.mp4"
  frames = exports.write_clip(path, 3)
  code = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
  for was, now in {
    '"FOLDER"': repr(str(folder)),
    '"What happens?"': repr(QUESTION),
    "max_new_tokens=256": f"max_new_tokens={MAX_NEW}",
  }.items():
    code = code.replace(was, now)
  exec(code, found := {"frames": frames})
  want = answer(open_workdir(str(workdir)), path)
  assert found["text"].strip().rstrip("\ufffd") == want
  assert answer(open_export(folder, frames=3), path) == want
