"""A Qwen3-VL that starts from the shipped LLaVA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools.pretraining import qwen_tokenizer, warm_start
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.huggingface import convert
from vlmrlaif_jax.models import clip
from vlmrlaif_jax.runtime import run

FOLDER = run.resolve_checkpoint("builtin:tiny")
EMBED = 96


@pytest.fixture(scope="module")
def old():
  return convert.load_checkpoint(FOLDER, dtype="float32")[1]["params"]


@pytest.fixture(scope="module")
def frames():
  """Images of smooth noise."""
  coarse = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
  return coarse.repeat(8, axis=1).repeat(8, axis=2)


def start_tower(old, frames):
  random = np.random.default_rng(1).normal(size=(2 * 3 * 8**2, EMBED))
  new = {"patch": {"kernel": random.astype(np.float32)}}
  return warm_start.start_tower(new, old["vision"], frames)


def embed_frames(tower, first, second):
  """Embeddings of the patches of two frames, in raster order."""
  pixels = np.stack([first, second], 1) / np.float32(127.5) - 1
  cut = pixels.reshape(len(first), 2, 4, 8, 4, 8, 3).transpose(0, 2, 4, 6, 1, 3, 5)
  patches = cut.reshape(len(first), 16, -1)
  patch = tower["patch"]
  return patches @ patch["kernel"] + patch["bias"] + tower["position_embedding"]


def test_a_still_patch_is_embedded_nearly_as_by_clip(old, frames):
  tower = clip.VisionTower(image=32, patch=8, embed=EMBED, mlp=384, layers=3, heads=4)
  want = tower.apply(
    {"params": old["vision"]},
    tower.normalize(jnp.asarray(frames)),
    method=lambda tower, pixels: tower._embed(tower._cut(pixels))[:, 1:],
  )
  got = embed_frames(start_tower(old, frames), frames, frames)
  aligned = [np.corrcoef(a, b)[0, 1] for a, b in zip(
    got.reshape(-1, EMBED), np.asarray(want).reshape(-1, EMBED), strict=True
  )]  # fmt: skip
  assert np.mean(aligned) > 0.95


def test_a_change_between_frames_is_visible(old, frames):
  tower = start_tower(old, frames)
  forward = embed_frames(tower, frames[:4], frames[4:])
  backward = embed_frames(tower, frames[4:], frames[:4])
  assert np.abs(forward - backward).mean() > 0.1


def test_tokens_start_as_the_tokens_of_their_text(old):
  tok = qwen_tokenizer.train(["The red object moves left."] * 50, 400)
  old_tok = tokenization.load_tokenizer(FOLDER)
  shape = (4, 32)
  norms = {"scale": np.ones(shape)}
  new = {"blocks": {"q_norm": norms, "k_norm": norms}}
  llm = warm_start.start_llm(new, old["llm"], tok, old_tok)
  rows, old_rows = (np.asarray(x["embed"]["embedding"]) for x in (llm, old["llm"]))
  same = {" red": "▁red", qwen_tokenizer.END: "</s>", qwen_tokenizer.START: "<s>"}
  for text, source in same.items():
    (i,) = tok.encode(text, add_special_tokens=False)
    np.testing.assert_array_equal(
      rows[i], old_rows[old_tok.convert_tokens_to_ids(source)]
    )
  assert llm["lm_head"]["kernel"].shape == (128, len(tok))
  assert set(llm["blocks"]) == {*old["llm"]["blocks"], "q_norm", "k_norm"}
  assert jax.tree.map(np.shape, llm["blocks"]["q_norm"]) == {"scale": shape}


def test_outputs_have_the_root_mean_square_of_unit_inputs():
  kernels = np.full((1, 4, 3), 2.0)
  scales = np.array([[1.0, 1.0, 1.0, 0.0]])
  got = warm_start._measure_outputs(kernels, scales)
  np.testing.assert_allclose(got, [np.sqrt(3 * 4.0)], rtol=1e-6)
