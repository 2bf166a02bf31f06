"""Likeness by a CLIP folder: weights, tokenizer, cosine, and what is cut."""

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.models.test_clip_text import SHAPE, their_config
from vlmrlaif_jax.evals import clip_similarity

WORDS = ["<pad>", "<start>", *"abcdefghij", "."]
TEXTS = ["a b c", "d", "a b c", "e f g h i j a b c d e f g h i j a b"]


def save_tokenizer(folder, end=SHAPE["vocab"] - 1):
  ids = {word: i for i, word in enumerate(WORDS)} | {"<end>": end}
  made = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.post_processor = processors.TemplateProcessing(
    single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", end)]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, bos_token="<start>", eos_token="<end>", pad_token="<end>"
  ).save_pretrained(folder)


def save_text_tower(folder):
  """A text tower of random weights and a tokenizer; returns the tower."""
  torch.manual_seed(0)
  text = transformers.CLIPTextModelWithProjection(their_config("quick_gelu"))
  with torch.no_grad():
    for p in text.parameters():
      p.add_(0.2 * torch.randn_like(p))
  text.save_pretrained(folder)
  save_tokenizer(folder)
  return text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A CLIPModel, and its text tower by itself, with the same weights."""
  whole, alone = (tmp_path_factory.mktemp(name) for name in ("whole", "alone"))
  text = save_text_tower(alone)
  side = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
  vision = dict(**side, num_hidden_layers=1, image_size=8, patch_size=4)
  both = transformers.CLIPModel(
    transformers.CLIPConfig(
      text_config=text.config.to_dict(), vision_config=vision, projection_dim=24
    )
  )
  both.load_state_dict(text.state_dict(), strict=False)
  both.save_pretrained(whole)
  save_tokenizer(whole)
  return whole, alone


def theirs(folder, texts):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
  read = tokenizer(texts, padding=True, truncation=True, max_length=SHAPE["context"],
                   return_tensors="pt")  # fmt: skip
  with torch.no_grad():
    made = model(read["input_ids"], read["attention_mask"]).text_embeds
  return torch.nn.functional.normalize(made).numpy()


def test_likeness_is_the_cosine_of_transformers(folders):
  _, alone = folders
  alike = clip_similarity.make_clip_similarity(alone, cut=0, batch=3)
  vectors = theirs(alone, TEXTS)  # The last is longer than the context.
  np.testing.assert_allclose(alike.compare(TEXTS, TEXTS[:2]), vectors @ vectors[:2].T,
                             atol=2e-6)  # fmt: skip


def test_a_whole_clip_gives_the_same(folders):
  both = [
    clip_similarity.make_clip_similarity(folder, cut=0, batch=2) for folder in folders
  ]
  np.testing.assert_array_equal(*(each.compare(TEXTS, TEXTS) for each in both))
  assert both[0].facts["version"] == both[1].facts["version"]


def test_the_same_text_is_as_alike_to_the_bit(folders):
  found = clip_similarity.make_clip_similarity(folders[1], cut=0, batch=2).compare(
    TEXTS, TEXTS
  )
  np.testing.assert_array_equal(found[0], found[2])


def test_what_a_policy_says_is_cut_and_captions_are_not(folders):
  alike = clip_similarity.make_clip_similarity(folders[1], cut=5, batch=2)
  whole = clip_similarity.make_clip_similarity(folders[1], cut=0, batch=2)
  np.testing.assert_array_equal(
    alike.compare(["a. b c d e"], ["a b c d"]), whole.compare(["a b c"], ["a b c d"])
  )
  assert alike.facts["cut"] == 5


def test_a_folder_that_is_not_there_says_where_it_comes_from(tmp_path):
  for folder in ("", str(tmp_path)):
    with pytest.raises(ValueError, match="clip=.*contains no CLIP.*clip-vit-base-pat"):
      clip_similarity.check_clip_folder(folder)


def test_another_kind_of_folder_is_refused(tmp_path, folders):
  (tmp_path / "config.json").write_text('{"model_type": "llava"}')
  with pytest.raises(ValueError, match="must contain a clip or a clip_text_model"):
    clip_similarity.load_text_encoder(tmp_path)


def test_a_tokenizer_of_another_end_is_refused(tmp_path, folders):
  for file in folders[1].iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  save_tokenizer(tmp_path, end=20)
  with pytest.raises(ValueError, match="ends texts with id 20"):
    clip_similarity.make_clip_similarity(tmp_path, cut=0)
