"""Computes text similarity by CLIP's text tower, from a checkpoint of Hugging Face."""

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from transformers import CLIPConfig, CLIPTextConfig

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import tokenization
from vlmrlaif_jax.evals.text_similarity import Similarity
from vlmrlaif_jax.huggingface import (
  param_mapping,
  published_names,
)
from vlmrlaif_jax.models import clip_text
from vlmrlaif_jax.models.layers import read_fields

CLIP_SOURCE = (
  "the papers use https://huggingface.co/openai/clip-vit-base-patch32 (config.json, "
  "model.safetensors or pytorch_model.bin, and the tokenizer's files)"
)
_OTHERS = re.compile(r"vision_model\.|visual_projection\.|logit_scale$")


def check_clip_folder(folder: str) -> None:
  """Checks that a folder contains a CLIP checkpoint.

  Raises:
    ValueError: It contains none. The message starts with the setting "clip".
  """
  if not folder or not (Path(folder) / "config.json").is_file():
    raise ValueError(
      f"clip={folder!r} contains no CLIP: set --config.evaluate.clip to a folder with "
      f"one; {CLIP_SOURCE}"
    )


def load_text_encoder(folder: str | Path) -> tuple[clip_text.TextEncoder, Params]:
  """Loads the text tower of a CLIPModel or CLIPTextModelWithProjection folder.

  Raises:
    FileNotFoundError: The folder has no checkpoint.
    ValueError: The checkpoint is of another kind.
  """
  folder = Path(folder)
  kind = read_json(folder / "config.json").get("model_type")
  if kind == "clip":
    full = CLIPConfig.from_pretrained(folder).to_dict()
    config, features = full["text_config"], full["projection_dim"]
  elif kind == "clip_text_model":
    config = CLIPTextConfig.from_pretrained(folder).to_dict()
    features = config["projection_dim"]
  else:
    raise ValueError(
      f"{folder} must contain a clip or a clip_text_model, got {kind!r}: {CLIP_SOURCE}"
    )
  tower = clip_text.TextTower(**read_fields(clip_text.TEXT_CONFIG, config))
  model = clip_text.TextEncoder(tower, features)
  tokens = jnp.zeros((1, 1), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens == 0)
  tensors, _ = published_names.open_tensors(folder, rename=lambda name: name)
  tensors = {name: x for name, x in tensors.items() if not _OTHERS.match(name)}
  return model, param_mapping.convert_from_hf(
    clip_text.HF_TEXT, tensors, shapes["params"]
  )


def make_clip_similarity(
  folder: str | Path, *, cut: int, batch: int = 256
) -> Similarity:
  """Returns the cosine similarity of CLIP's text features.

  Texts longer than the tower's context are truncated.

  Args:
    folder: Folder of the checkpoint.
    cut: Number of characters of each response to encode, after full stops are removed,
      as in VLM-Eval (2311.11865). 0 encodes the text unchanged.
    batch: Texts per batch.

  Raises:
    ValueError: The tokenizer's EOS is not the token that the tower reads.
  """
  model, params = load_text_encoder(folder)
  tokenizer = tokenization.load_tokenizer(folder)
  if tokenizer.eos_token_id != model.text.vocab - 1:
    raise ValueError(
      f"the tokenizer of {folder} ends texts with id {tokenizer.eos_token_id}, but "
      f"CLIP's tower requires the last id, {model.text.vocab - 1}: {CLIP_SOURCE}"
    )

  def encode(texts: Sequence[str]) -> Float[np.ndarray, "texts features"]:
    """Returns unit vectors; equal texts are encoded once, so that they tie exactly."""
    indices = {t: i for i, t in enumerate(dict.fromkeys(texts))}
    distinct = [*indices, *[""] * (-len(indices) % batch)]
    rows = [np.zeros((0, model.features), np.float32)]
    for start in range(0, len(distinct), batch):
      tokens = tokenizer(
        distinct[start : start + batch],
        padding="max_length",
        truncation=True,
        max_length=model.text.context,
        return_tensors="np",
      )
      mask = tokens["attention_mask"].astype(bool)
      rows.append(np.asarray(_encode(model, params, tokens["input_ids"], mask)))
    return np.concatenate(rows)[[indices[t] for t in texts]]

  def compare(responses: Sequence[str], others: Sequence[str]):
    texts = [t.replace(".", "")[:cut] for t in responses] if cut else responses
    return encode(texts) @ encode(others).T

  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  facts = {
    "version": digest.hexdigest()[:16],
    "checkpoint": Path(folder).name,
    "cut": cut,
  }
  return Similarity("clip", facts, compare)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, params, tokens, mask):
  return model.apply({"params": params}, tokens, mask)
