"""Language models and towers of other kinds equal transformers, and are exported."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.helpers import checkpoints as made
from tests.helpers.rows import text_batch
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.sampling.generate import generate

LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=500.0,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=24,
)
NEW = 6  # Sampled tokens.
MODELS = {
  "mistral": dict(text="mistral"),
  "mistral in its window": dict(text="mistral", settings=dict(sliding_window=40)),
  "mistral with head_dim": dict(text="mistral", settings=dict(head_dim=16)),
  "llama 3": dict(rope=LLAMA3, settings=dict(max_position_embeddings=96)),
  "linear rope": dict(rope=dict(rope_type="linear", factor=2.0)),
  "two feature layers": dict(vision_feature_layer=[-2, -3]),
  "one layer in a list": dict(vision_feature_layer=[1]),
  "siglip, three layers": dict(vision="siglip", vision_feature_layer=[-1, 0, 2]),
  "qwen2 in its window": dict(
    text="qwen2",
    settings=dict(use_sliding_window=True, sliding_window=40, max_window_layers=1),
  ),
}


@functools.cache
def build(name):
  return made.llava(**MODELS[name])


@functools.cache
def load(folder):
  return convert.load_checkpoint(folder, dtype="float32")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("families")
  for name in MODELS:
    build(name).save_pretrained(root / name)
  return root


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(root, name):
  want = made.theirs(build(name))
  assert np.std(want) > 0.3  # Or any tolerance would do.
  np.testing.assert_allclose(made.ours(*load(root / name)[:2]), want, atol=2e-5)


@pytest.mark.parametrize("name", ["mistral in its window", "llama 3", "linear rope"])
def test_greedy_text_equals_transformers(root, name):
  pixels, tokens, mask = made.inputs()
  with torch.no_grad():
    want = build(name).generate(
      input_ids=torch.tensor(tokens),
      pixel_values=torch.tensor(np.moveaxis(pixels, -1, 1)),
      attention_mask=torch.tensor(mask).long(),
      max_new_tokens=NEW,
      do_sample=False,
      eos_token_id=None,
      suppress_tokens=[made.IMAGE],
      pad_token_id=0,
    )[:, -NEW:]
  model, variables, _ = load(root / name)
  tokens = np.where(tokens == made.IMAGE, VIDEO_TOKEN, tokens)
  prompts = text_batch(pixels[:, None], tokens, mask, mask & False)
  sample = functools.partial(
    generate, model, max_new=NEW, temperature=0.0, stops=(99,), pad=0, vocab=made.IMAGE
  )
  got = jax.jit(sample)(
    variables, jax.tree.map(jnp.asarray, prompts), jax.random.key(0)
  )
  np.testing.assert_array_equal(got.batch.tokens[:, -NEW:], want)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_export(root, tmp_path, name):
  _, variables, config = load(root / name)
  convert.save_checkpoint(tmp_path, variables["params"], config, "float32")
  again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
  np.testing.assert_array_equal(made.theirs(again.eval()), made.theirs(build(name)))


@pytest.mark.parametrize("name", MODELS)
def test_config_that_is_made_of_a_model_is_read_back(root, tmp_path, name):
  model, variables, _ = load(root / name)
  config = convert.make_llava_config(model, image_token=made.IMAGE)
  convert.save_checkpoint(tmp_path, variables["params"], config, "float32")
  assert convert.load_checkpoint(tmp_path, dtype="float32")[0] == model


@pytest.mark.parametrize("text", ["mistral", "qwen2"])
def test_row_that_is_longer_than_the_window_is_an_error(tmp_path, text):
  window = dict(use_sliding_window=True, max_window_layers=1) if text == "qwen2" else {}
  made.llava(text, settings=dict(sliding_window=23, **window)).save_pretrained(tmp_path)
  with pytest.raises(UserError, match="sliding_window=23 .* a row has 24 tokens"):
    made.ours(*convert.load_checkpoint(tmp_path, dtype="float32")[:2])


def test_window_that_no_layer_uses_is_no_window(tmp_path):
  settings = dict(sliding_window=4, use_sliding_window=False)
  made.llava("qwen2", settings=settings).save_pretrained(tmp_path)
  assert convert.load_checkpoint(tmp_path, dtype="float32")[0].llm.window is None


def test_another_mean_of_pixels_is_used(tmp_path):
  made.llava().save_pretrained(tmp_path)
  preprocessor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 1.0, 2.0]}
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
  notes = []
  model, _, _ = convert.load_checkpoint(tmp_path, dtype="float32", note=notes.append)
  got = model.vision.normalize(jnp.full((1, 1, 3), 255, jnp.uint8))
  np.testing.assert_allclose(got[0, 0], [1.8, 0.8, 0.35], rtol=1e-6)
  assert "normalized by image_mean=[0.1, 0.2, 0.3]" in notes[0]


# The original layout.


@pytest.fixture
def tower(tmp_path):
  return made.write_tower(tmp_path / "tower", made.llava())


def write_original(folder, model, tower, **config):
  folder.mkdir()
  values = made.original_config(mm_vision_tower=str(tower), **config)
  (folder / "config.json").write_text(json.dumps(values))
  made.write_shards(
    folder, made.language_tensors(model) | made.projector_tensors(model)
  )
  return folder


SCALED = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}


@pytest.mark.parametrize(
  "model_type, name, config",
  [
    ("llava_mistral", "mistral", dict(sliding_window=None, rope_theta=500.0)),
    ("llava_llama", "llama 3", dict(rope_scaling=SCALED, max_position_embeddings=96)),
    ("llava_llama_3", "llama 3", dict(rope_scaling=SCALED, max_position_embeddings=96)),
    ("llava_qwen", "qwen2", dict(tie_word_embeddings=True)),
  ],
)
def test_original_layout_equals_transformers(tmp_path, tower, model_type, name, config):
  model = build(name) if name in MODELS else made.llava(name)
  folder = write_original(tmp_path / "x", model, tower, model_type=model_type, **config)
  got = made.ours(*convert.load_checkpoint(folder, dtype="float32")[:2])
  np.testing.assert_allclose(got, made.theirs(model), atol=2e-5)


@pytest.mark.parametrize(
  "model_type", ["llava_phi", "llava_mixtral", "llava_gemma", "llava_qwen_moe", None]
)
def test_other_language_model_of_the_original_layout_is_named(
  tmp_path, tower, model_type
):
  folder = write_original(tmp_path / "x", made.llava(), tower, model_type=model_type)
  with pytest.raises(ValueError, match=f"model_type must be one of .*{model_type}"):
    convert.load_checkpoint(folder)


def test_trained_tower_that_is_not_among_the_files_is_an_error(tmp_path, tower):
  config = dict(unfreeze_mm_vision_tower=True)
  folder = write_original(tmp_path / "x", made.llava(), tower, **config)
  with pytest.raises(ValueError, match="unfreeze_mm_vision_tower"):
    convert.load_checkpoint(folder)
