"""The Qwen3-VL that the package ships: of Hugging Face's form, and small."""

import jax
import numpy as np
import pytest
import torch
import transformers

from configs import ppo, published
from tests.helpers.rows import text_batch
from tools.pretraining import qwen_tokenizer
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import prompts, tokenization
from vlmrlaif_jax.data.processors.interface import Grid, Visual, lay_out
from vlmrlaif_jax.data.processors.llava import LlavaProcessor
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.runtime import run

FOLDER = run.resolve_checkpoint("builtin:tiny_qwen3vl")
TEMPLATE = tokenization.get_template("chat_template")
CLIP = Visual(Grid(6, 4, 4), tuple(np.arange(12) / 4))
QUESTION = "What happens first, the red object stops or the blue object vanishes?"


@pytest.fixture(scope="module")
def tokenizer():
  return tokenization.load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def loaded():
  """(model, variables, config, processor)."""
  made = convert.load_checkpoint(FOLDER, dtype="float32")
  model, _, published = made
  return *made, convert.load_processor(FOLDER, published, model, 12)


def test_whole_checkpoint_takes_at_most_8_mb():
  assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 8e6


def test_clips_of_the_world_have_the_layout_of_pretraining(loaded):
  *_, processor = loaded
  assert processor.choose_grid(64, 64, 12) == CLIP.grid
  assert processor.sample_frames(24, 8.0).size == len(CLIP.seconds)


def test_logits_equal_those_of_transformers(tokenizer, loaded):
  model, variables, config, processor = loaded
  row = tokenization.encode_conversation(
    tokenizer, TEMPLATE, [(QUESTION, None)], video=lay_out(processor, CLIP)
  )
  frames = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
  pixels = processor.process(frames, CLIP.grid).pixels
  encode = jax.jit(lambda x: model.apply(variables, x, (4, 4), method="encode"))
  features = encode(pixels.reshape(6, 16, -1)).reshape(1, -1, 3 * model.llm.embed)
  tokens = np.array([row.ids], np.int32)
  real = np.ones_like(tokens, bool)
  batch = text_batch(features, tokens, real, ~real)
  batch = batch._replace(positions=row.positions[None])
  got = jax.jit(model.apply)(variables, batch)
  theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
    FOLDER, dtype=torch.float32
  ).eval()
  ids = np.where(tokens == VIDEO_TOKEN, config["video_token_id"], tokens)
  with torch.no_grad():
    want = theirs(
      input_ids=torch.tensor(ids).long(),
      pixel_values_videos=torch.tensor(pixels),
      video_grid_thw=torch.tensor([CLIP.grid]),
      mm_token_type_ids=torch.tensor(2 * (tokens == VIDEO_TOKEN)).int(),
    ).logits
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_chat_template_writes_turns_of_text_and_videos(tokenizer):
  turns = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Why?"}]},
    {"role": "assistant", "content": "No."},
  ]
  got = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
  assert got == (
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Why?<|im_end|>\n"
    "<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>assistant\n"
  )
  assert tokenizer.chat_template == qwen_tokenizer.CHAT_TEMPLATE


def test_preset_has_room_for_the_longer_prompts(tokenizer, loaded):
  *_, processor = loaded
  pooled = LlavaProcessor(12, image=32, patch=8)
  old = tokenization.load_tokenizer(run.resolve_checkpoint("builtin:tiny"))
  count = lambda *args, video: len(
    tokenization.encode_conversation(*args, [(QUESTION, None)], video=video).ids
  )
  more = count(tokenizer, TEMPLATE, video=lay_out(processor, CLIP)) - count(
    old, tokenization.get_template("brief"), video=lay_out(pooled, pooled.layout)
  )
  tiny, larger = ppo.tiny(), published.derive_preset({"tiny": ppo.tiny}, "tiny_qwen3vl")
  for section, name in (
    ("data", "prompt_len"),
    ("label", "judge_prompt_len"),
    ("evaluate", "prompt_len"),
  ):
    assert larger[section][name] >= tiny[section][name] + more


def test_reward_prompt_is_the_turn_that_pretraining_taught(tokenizer):
  turns = [("Is there a ring?", "Yes."), (prompts.BRIEF_PROMPTS.check, None)]
  whole = tokenization.encode_conversation(tokenizer, TEMPLATE, turns).ids
  asked = prompts.BRIEF_PROMPTS.reward
  reward = tokenization.encode_follow_up(tokenizer, TEMPLATE, asked, "")
  _, end_of_answer, _ = np.flatnonzero(np.array(whole) == tokenizer.eos_token_id)
  assert whole[end_of_answer + 1 :] == reward
