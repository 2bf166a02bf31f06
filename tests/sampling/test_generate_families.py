"""Greedy responses of each family equal those of transformers' generate.

One program samples 20 rows of up to 64 tokens. The rows have one or two videos, or a
video and an image, of several grids. They are padded on the left.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.helpers import onevision, qwen, qwen2_5, smolvlm
from vlmrlaif_jax.core.types import VIDEO_TOKEN, Batch
from vlmrlaif_jax.data import templates, tokenization
from vlmrlaif_jax.data.processors.interface import (
  Grid,
  Visual,
  count_features,
  lay_out,
)
from vlmrlaif_jax.huggingface import convert, families
from vlmrlaif_jax.models import clip
from vlmrlaif_jax.sampling.generate import generate

NEW, GAP = 64, 1e-4
QUESTIONS = (
  "What?",
  "What happens in the video?",
  "The red ring moves. Does it?",
  "Who is the user, and what does the user do in 1.5 seconds?",
  "Is it red?",
)


class Media(NamedTuple):
  """An image or a video of a row."""

  visual: Visual
  theirs: np.ndarray  # Pixels for transformers.
  ours: np.ndarray  # Pixels for our tower: time, patches, channels.


class Family(NamedTuple):
  """A family, and how its models receive media."""

  write: Callable  # Writes a checkpoint into a folder, and returns transformers' model.
  tokenizer: Callable
  visuals: tuple[tuple[Visual, ...], ...]  # Of each kind of row.
  make_pixels: Callable  # (visual, seed) -> pixels for transformers and for our tower.
  make_inputs: Callable  # Rows of media -> transformers' inputs without tokens.
  eos: int  # A token that ends some of the responses, in addition to the EOS token.
  get_video_id: Callable = lambda config: config.video_token_id  # transformers' id.
  batch_key: Callable = lambda row: 0  # Equal for rows that transformers can batch.
  seed: int = 0  # Seed of pixels, with which no choice is a near tie.


def make_clip(count, grid, rate=2.0):
  return Visual(grid, tuple(np.arange(count) / rate), rate)


# Qwen2.5-VL and Qwen3-VL.

# transformers 5.24 continues after the height or the width of a video; see
# helpers/qwen2_5.py. So no video is longer than its greater side here.
CLIPS = make_clip(4, Grid(2, 4, 6)), make_clip(6, Grid(3, 6, 4), rate=4.0)
IMAGE = Visual(Grid(1, 4, 4))


def make_qwen_pixels(visual, seed):
  shape = (visual.grid.time, visual.grid.height * visual.grid.width, 6 * 4**2)
  pixels = np.random.default_rng(seed).normal(size=shape).astype("f4")
  return pixels.reshape(-1, shape[-1]), pixels


def make_qwen_inputs(rows):
  media = [x for row in rows for x in row]
  inputs = {}
  for key, size, is_clip in (
    ("pixel_values", "image_grid_thw", False),
    ("pixel_values_videos", "video_grid_thw", True),
  ):
    some = [x for x in media if bool(x.visual.seconds) == is_clip]
    inputs[key] = np.concatenate([x.theirs for x in some])
    inputs[size] = np.array([x.visual.grid for x in some])
  return inputs


def make_qwen2_5_inputs(rows):
  seconds = [2 / x.visual.rate for row in rows for x in row if x.visual.seconds]
  return make_qwen_inputs(rows) | {"second_per_grid_ts": np.float32(seconds)}


# LLaVA-OneVision.

PAIR, FIVE = (
  make_clip(count, Grid(count, onevision.POOLED, onevision.POOLED)) for count in (2, 5)
)
CROPPED = Visual(onevision.PROCESSOR.choose_grid(40, 90, None), size=(40, 90))


def make_onevision_pixels(visual, seed):
  theirs, ours = onevision.make_squares(visual.grid.time, seed)
  return theirs.numpy(), ours


def make_onevision_inputs(rows):
  media = [x for row in rows for x in row]
  clips = [x.theirs for x in media if x.visual.seconds]
  images = [x for x in media if not x.visual.seconds]
  inputs = {"pixel_values_videos": np.stack(clips)}
  if images:
    inputs["pixel_values"] = np.stack([x.theirs for x in images])
    inputs["image_sizes"] = np.array([x.visual.size for x in images])
  return inputs


# SmolVLM2.

SQUARES = {count: make_clip(count, Grid(count, 4, 4), rate=1.0) for count in (1, 2, 3)}
SPLIT = Visual(Grid(1, 8, 12))  # 2 x 3 crops, and the whole image.


def make_smolvlm_pixels(visual, seed):
  rows, columns = visual.grid.height // 4, visual.grid.width // 4
  count = visual.grid.time if visual.seconds else rows * columns + 1
  shape = (count, smolvlm.SIDE, smolvlm.SIDE, 3)
  squares = np.random.default_rng(seed).normal(size=shape).astype("f4")
  patches = np.asarray(clip.cut_patches(jnp.asarray(squares), smolvlm.SIDE, 8))
  ours = patches.reshape(visual.grid.time, -1, patches.shape[-1])
  return np.moveaxis(squares, -1, 1), ours


def make_smolvlm_inputs(rows):
  """Squares of all frames and crops; rows are padded by zeros."""
  squares = [np.concatenate([x.theirs for x in row]) for row in rows]
  pixels = np.zeros((len(rows), max(map(len, squares)), *squares[0].shape[1:]), "f4")
  for row, own in zip(pixels, squares, strict=True):
    row[: len(own)] = own
  return {"pixel_values": pixels}


FAMILIES = {
  "qwen3_vl": Family(
    qwen.write_checkpoint,
    qwen.make_tokenizer,
    ((CLIPS[0],), (CLIPS[1],), CLIPS, (IMAGE, CLIPS[0])),
    make_qwen_pixels,
    make_qwen_inputs,
    eos=253,
  ),
  "qwen2_5_vl": Family(
    qwen2_5.write_checkpoint,
    qwen.make_tokenizer,
    ((CLIPS[0],), (CLIPS[1],), CLIPS, (IMAGE, CLIPS[0])),
    make_qwen_pixels,
    make_qwen2_5_inputs,
    eos=268,
  ),
  "llava_onevision": Family(
    functools.partial(onevision.write_checkpoint, tied=False),
    onevision.make_tokenizer,
    ((PAIR,), (FIVE,), (PAIR, PAIR), (CROPPED, FIVE)),
    make_onevision_pixels,
    make_onevision_inputs,
    eos=58,
    batch_key=lambda row: row[-1].visual.grid.time,
    seed=10,
  ),
  "smolvlm": Family(
    smolvlm.write_checkpoint,
    smolvlm.make_tokenizer,
    ((SQUARES[3],), (SQUARES[1],), (SQUARES[2], SQUARES[3]), (SPLIT, SQUARES[2])),
    make_smolvlm_pixels,
    make_smolvlm_inputs,
    eos=332,
    get_video_id=lambda config: config.image_token_id,
  ),
}


class Prompts(NamedTuple):
  """Prompts as both models receive them."""

  media: list[list[Media]]  # Of each row.
  rows: tokenization.TokenRows
  kinds: np.ndarray  # 1 at the placeholders of images, 2 at those of videos.
  features: np.ndarray  # By our tower, padded on the right.


class Greedy(NamedTuple):
  """Greedy responses to the same prompts."""

  tokens: np.ndarray  # Ours, with padding after the end.
  mask: np.ndarray  # The tokens until the end.
  logps: np.ndarray  # Log-probabilities of our tokens.
  want: np.ndarray  # Tokens of transformers, with padding after the end.
  logits: torch.Tensor  # Logits of transformers at each step.
  vocab: int  # Number of the first ids that can be sampled.


def make_media(family):
  """Returns each kind of row with each question; all pixels differ."""
  rows = [each for each in family.visuals for _ in QUESTIONS]
  make = lambda visual, seed: Media(visual, *family.make_pixels(visual, seed))
  return [
    [make(x, family.seed + 1000 * i + j) for j, x in enumerate(row)]
    for i, row in enumerate(rows)
  ]


def encode_media(processor, model, variables, media):
  """Encodes the features of each row, in one batch for each grid."""
  encode = jax.jit(
    functools.partial(model.apply, variables, method="encode"), static_argnums=1
  )
  every, features = [x for row in media for x in row], {}
  for grid in sorted({x.visual.grid[1:] for x in every}):
    some = [x for x in every if x.visual.grid[1:] == grid]
    encoded = np.asarray(encode(np.concatenate([x.ours for x in some]), grid))
    ends = np.cumsum([len(x.ours) for x in some])[:-1]
    for x, own in zip(some, np.split(encoded, ends), strict=True):
      features[id(x)] = processor.arrange(own, x.visual)
  rows = [np.concatenate([features[id(x)] for x in row]) for row in media]
  longest = max(map(len, rows))
  return np.stack([np.pad(row, [(0, longest - len(row)), (0, 0)]) for row in rows])


def make_prompts(family, folder, config, model, variables):
  processor, tokenizer = families.read_processor(folder, config), family.tokenizer()
  template = templates.get_template("chat_template")
  media = make_media(family)
  encoded = [
    tokenization.encode_conversation(
      tokenizer, template, [(question, None)],
      video=lay_out(processor, *(x.visual for x in row)),
    )
    for row, question in zip(media, QUESTIONS * len(family.visuals), strict=True)
  ]  # fmt: skip
  rows = tokenization.pad_rows(
    encoded, prompt_len=max(len(row.ids) for row in encoded), response_len=0,
    pad=tokenizer.pad_token_id,
  )  # fmt: skip
  kinds = np.zeros(rows.tokens.shape, int)
  for row, tokens, kind in zip(media, rows.tokens, kinds, strict=True):
    counts = [count_features(lay_out(processor, x.visual)) for x in row]
    is_video = [bool(x.visual.seconds) for x in row]
    kind[tokens == VIDEO_TOKEN] = np.repeat(1 + np.array(is_video), counts)
  features = encode_media(processor, model, variables, media)
  return Prompts(media, rows, kinds, features)


def generate_theirs(family, hf, prompts, settings):
  """Returns tokens and logits of transformers, from batches that it supports."""
  media, (ids, mask, *_), kinds, _ = prompts
  shape = len(media), NEW
  tokens = np.full(shape, settings["pad"])
  logits = torch.zeros((*shape, hf.config.text_config.vocab_size))
  image, video = hf.config.image_token_id, family.get_video_id(hf.config)
  ids = np.select([kinds == 1, kinds == 2], [image, video], ids.astype(int))
  sizes = np.array([family.batch_key(row) for row in media])
  for size in np.unique(sizes):
    rows = np.flatnonzero(sizes == size)
    inputs = {"input_ids": ids[rows], "attention_mask": mask[rows].astype(int)}
    inputs |= family.make_inputs([media[i] for i in rows])
    if "video_grid_thw" in inputs:
      inputs["mm_token_type_ids"] = kinds[rows]
    out = hf.generate(
      **{key: torch.tensor(x) for key, x in inputs.items()},
      do_sample=False, max_new_tokens=NEW, pad_token_id=settings["pad"],
      eos_token_id=list(settings["stops"]),
      suppress_tokens=list(range(settings["vocab"], logits.shape[-1])),
      output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens[rows, : len(out.logits)] = out.sequences[:, ids.shape[1] :]
    logits[rows, : len(out.logits)] = torch.stack(out.logits, 1)
  return tokens, logits


def write_sharp(family, folder):
  """Writes a checkpoint whose logits are four times as large, and so their gaps."""
  hf = family.write(folder)
  ends = lambda name: name.endswith("_model.norm.weight")
  (norm,) = [x for name, x in hf.named_parameters() if ends(name)]
  with torch.no_grad():
    norm.mul_(4)
  hf.save_pretrained(folder)
  return hf


@pytest.fixture(scope="module", params=FAMILIES)
def greedy(request, tmp_path_factory):
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # Two would wait for each other on a busy machine.
  family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
  hf = write_sharp(family, folder)
  model, variables, config = convert.load_checkpoint(folder, dtype="float32")
  prompts = make_prompts(family, folder, config, model, variables)
  tokenizer = family.tokenizer()
  # Ids after the EOS token stand for media, so they are not sampled.
  eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
  settings = dict(stops=(eos, family.eos), pad=pad, vocab=eos + 1)
  want, logits = generate_theirs(family, hf, prompts, settings)
  sample = functools.partial(generate, model, max_new=NEW, temperature=0.0, **settings)
  batch = Batch(*map(jnp.asarray, (prompts.features, *prompts.rows)))
  batch, logps = jax.jit(sample)(variables, batch, jax.random.key(0))
  ours = map(np.array, (batch.tokens, batch.loss_mask, logps))
  yield Greedy(*(x[:, -NEW:] for x in ours), want, logits, eos + 1)
  torch.set_num_threads(threads)


def test_no_choice_is_a_near_tie(greedy):
  top, second = greedy.logits[..., : greedy.vocab].topk(2).values[greedy.mask].T
  assert (top - second).min() > GAP


def test_tokens_equal_transformers(greedy):
  lengths = greedy.mask.sum(axis=1)
  assert lengths.min() < NEW == lengths.max()
  assert len(np.unique(greedy.want, axis=0)) > 15  # Responses depend on prompts.
  np.testing.assert_array_equal(greedy.tokens, greedy.want)


def test_log_probabilities_equal_transformers(greedy):
  logps = torch.log_softmax(greedy.logits, -1)
  want = logps.gather(-1, torch.tensor(greedy.want)[..., None])[..., 0]
  np.testing.assert_allclose(greedy.logps[greedy.mask], want[greedy.mask], atol=2e-5)
