"""The checkpoint that the package ships: of Hugging Face's form, and small."""

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.helpers.rows import text_batch
from tools.pretraining import convert_clip
from tools.pretraining.tokenizer import CHAT_TEMPLATE
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.data.processors.llava import lay_out_features
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.runtime import run

FOLDER = run.resolve_checkpoint("builtin:tiny")


@pytest.fixture(scope="module")
def tokenizer():
  return tokenization.load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def pixels():
  """Two normalised images, one to a row."""
  return np.random.default_rng(0).normal(size=(2, 1, 32, 32, 3)).astype(np.float32)


def test_whole_checkpoint_takes_at_most_8_mb():
  sizes = [f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()]
  assert sum(sizes) <= 8e6


def test_model_has_one_to_five_million_parameters():
  params = convert.load_checkpoint(FOLDER)[1]["params"]
  text_tower = convert_clip.load(FOLDER / "clip")[1]["text"]
  count = sum(x.size for x in jax.tree.leaves((params, text_tower)))
  assert 1e6 <= count <= 5e6


def test_logits_equal_those_of_transformers(tokenizer, pixels):
  model, variables, config = convert.load_checkpoint(FOLDER, dtype="float32")
  row = tokenization.encode_conversation(
    tokenizer,
    tokenization.CONVERSATION_TEMPLATES["brief"],
    [("Is there a red object?", None)],
    video=lay_out_features(16),
  )
  tokens = np.array([row.ids, row.ids], np.int32)
  real = np.ones_like(tokens, bool)
  got = jax.jit(model.apply)(variables, text_batch(pixels, tokens, real, ~real))
  theirs = transformers.LlavaForConditionalGeneration.from_pretrained(
    FOLDER, dtype=torch.float32
  ).eval()
  ids = np.where(tokens == VIDEO_TOKEN, config["image_token_index"], tokens)
  with torch.no_grad():
    want = theirs(
      input_ids=torch.tensor(ids).long(),
      pixel_values=torch.tensor(pixels[:, 0].transpose(0, 3, 1, 2)),
      attention_mask=torch.ones(ids.shape),
    ).logits
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_clip_equals_that_of_transformers(tokenizer, pixels):
  model, params, _ = convert_clip.load(FOLDER / "clip")
  end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
  ids = np.array(
    [
      [1, *tokenization.encode_suffix(tokenizer, f" a {size} red ring"), end]
      for size in SIZES
    ]
  )
  got = jax.jit(model.apply)({"params": params}, pixels[:, 0], ids, ids >= 0)
  theirs = transformers.CLIPModel.from_pretrained(FOLDER / "clip", dtype=torch.float32)
  with torch.no_grad():
    want = theirs.eval()(
      input_ids=torch.tensor(ids),
      pixel_values=torch.tensor(pixels[:, 0].transpose(0, 3, 1, 2)),
    ).logits_per_image
  np.testing.assert_allclose(got, want, atol=2e-4)


def test_chat_template_writes_what_ours_writes(tokenizer):
  turns = [
    {"role": "user", "content": "Is there a ring?"},
    {"role": "assistant", "content": "Yes, there is a ring."},
    {"role": "user", "content": "Where?"},
  ]
  want = "USER: Is there a ring? ASSISTANT: Yes, there is a ring.</s>USER: Where?"
  got = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
  assert got == want + " ASSISTANT:"


def test_chat_template_takes_content_in_parts(tokenizer):
  turns = [
    {
      "role": "user",
      "content": [{"type": "image"}, {"type": "text", "text": "Is there a ring?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
  ]
  got = tokenizer.apply_chat_template(turns, tokenize=False)
  assert got == "USER: <image>\nIs there a ring? ASSISTANT: Yes.</s>"
  assert tokenizer.chat_template == CHAT_TEMPLATE


SIZES = ("small", "large")
