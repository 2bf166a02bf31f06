"""The recipe of the shipped Qwen3-VL: its rows, an update, and its files."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import pretrain
from tools.pretraining import mix, program, qwen_base, qwen_method, qwen_tokenizer
from tools.pretraining.base import PHASES
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.training.update import init_state, make_update


@pytest.fixture(scope="module")
def config():
  made = pretrain.get_config("tiny_qwen3vl")
  made.videos = 4
  for name in PHASES:
    made[name].update(batch_size=2, name=name)
  return made


@pytest.fixture(scope="module")
def tok():
  """A tokenizer of few words, which also takes bytes."""
  words = ["What happens in the video? The red ring moves left, then vanishes."] * 50
  return qwen_tokenizer.train(words, 400)


@pytest.fixture(scope="module")
def base(config, tok, tmp_path_factory):
  folder = tmp_path_factory.mktemp("world")
  reading = qwen_base.make_reading(config)
  return qwen_base.make_base(config, tok, program.load_world(config, reading, folder))


@pytest.fixture(scope="module")
def exported(config, tok, base, tmp_path_factory):
  """(folder of the files after an update, parameters in them)."""
  folder = tmp_path_factory.mktemp("export")
  tok.save_pretrained(str(folder))
  batch = base.make_batch(config[PHASES[1]], 0)
  tx = optax.adam(1e-3)
  update = jax.jit(make_update(base.method.loss, tx))
  state, _ = update(init_state(base.params, tx), base.frozen, batch)
  base.export(folder, state.params)
  return folder, convert.load_checkpoint(folder, dtype="float32")[1]["params"]


def test_every_parameter_is_trained(base, exported):
  _, after = exported
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), base.params, after)
  assert min(jax.tree.leaves(moved)) > 5e-4


def test_processor_of_the_files_is_that_of_training(config, exported):
  folder, _ = exported
  model, _, published = convert.load_checkpoint(folder)
  processor = convert.load_processor(folder, published, model, 0)
  assert processor == qwen_base.make_processor(config)
  assert processor.choose_grid(64, 64, 12) == (6, 4, 4)
  assert processor.choose_grid(64, 64, None) == (1, 4, 4)


def test_generation_stops_at_the_end_of_a_turn(tok, exported):
  folder, _ = exported
  settings = json.loads((folder / "generation_config.json").read_text())
  assert settings["eos_token_id"][0] == tok.eos_token_id


def test_image_rows_have_one_temporal_patch(config, base):
  batch = base.make_batch(config[PHASES[0]], 0)
  assert batch.patches.shape == (2, 1, 16, 3 * 2 * 8**2)
  assert ((batch.tokens == VIDEO_TOKEN).sum(1) == 4).all()


def test_clip_rows_have_the_tokens_and_the_times_of_their_third(config, tok, base):
  batch = base.make_batch(config[PHASES[1]], 0)
  assert batch.patches.shape == (2, 6, 16, 3 * 2 * 8**2)
  assert ((batch.tokens == VIDEO_TOKEN).sum(1) == (6 + 2) * 4).all()

  def find_times(row, segment):
    ids = batch.tokens[row][batch.segments[row] == segment]
    return re.findall(r"<(\d+\.\d) seconds>", tok.decode(np.maximum(ids, 0)))

  for row, third in enumerate(batch.third):
    whole, part = find_times(row, 0), find_times(row, mix.CLIP_SEGMENT)
    assert len(whole) == 6 and part == whole[2 * third : 2 * third + 2]


def test_features_of_a_third_follow_those_of_the_clip():
  features = jnp.arange(2 * 6 * 2.0).reshape(2, 6, 2, 1)
  ordered = qwen_method.order_features(features, jnp.array([0, 2]))[..., 0]
  assert ordered[0].tolist() == [*range(12), *range(4)]
  assert ordered[1].tolist() == [*range(12, 24), *range(20, 24)]
  image = qwen_method.order_features(features[:, :1], jnp.array([0, 2]))[..., 0]
  assert image.tolist() == [[0, 1], [12, 13]]


def test_times_are_a_token_for_the_seconds_and_one_for_the_tenths(tok):
  split = functools.partial(tok.encode, add_special_tokens=False)
  pieces = [tok.decode([i]) for i in split("<1.5 seconds>")]
  assert pieces == ["<1", ".5", " seconds>"]
  assert tok.decode(split("<12.5 seconds> é")) == "<12.5 seconds> é"


def test_turns_are_those_of_the_chat_template(tok):
  turns = [("Is there a ring?", "Yes."), ("Where?", None)]
  encode = functools.partial(tokenization.encode_conversation, tok, turns=turns)
  own = encode(qwen_tokenizer.TEMPLATE)
  chat = encode(tokenization.get_template("chat_template"))
  assert own.ids == chat.ids and own.learn == chat.learn
