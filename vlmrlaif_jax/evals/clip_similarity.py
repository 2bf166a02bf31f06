"""How alike CLIP's text tower finds texts, from a checkpoint folder of Hugging Face."""

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
  checkpoint_layouts,
  param_mapping,
  published_names,
)
from vlmrlaif_jax.models import clip

CLIP_SOURCE = (
  "the papers' is https://huggingface.co/openai/clip-vit-base-patch32 (config.json, "
  "model.safetensors or pytorch_model.bin, and the tokenizer's files)"
)
_OTHERS = re.compile(r"vision_model\.|visual_projection\.|logit_scale$")


def check_clip_folder(folder: str) -> None:
  """Checks that a folder holds a CLIP.

  Raises:
    ValueError: it does not. The message starts with the setting "clip".
  """
  if not folder or not (Path(folder) / "config.json").is_file():
    raise ValueError(f"clip={folder!r} holds no CLIP: put one there; {CLIP_SOURCE}")


def load_text_encoder(folder: str | Path) -> tuple[clip.TextEncoder, Params]:
  """The text tower of a CLIPModel's folder, or of a CLIPTextModelWithProjection's.

  Raises:
    FileNotFoundError, ValueError: there is none, or of another kind.
  """
  folder = Path(folder)
  kind = read_json(folder / "config.json").get("model_type")
  if kind == "clip":
    whole = CLIPConfig.from_pretrained(folder).to_dict()
    config, features = whole["text_config"], whole["projection_dim"]
  elif kind == "clip_text_model":
    config = CLIPTextConfig.from_pretrained(folder).to_dict()
    features = config["projection_dim"]
  else:
    raise ValueError(
      f"{folder} must hold a clip or a clip_text_model, not {kind!r}: {CLIP_SOURCE}"
    )
  tower = clip.TextTower(**checkpoint_layouts.read_fields(clip.TEXT_CONFIG, config))
  model = clip.TextEncoder(tower, features)
  tokens = jnp.zeros((1, 1), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens == 0)
  held, _ = published_names.open_tensors(folder, rename=lambda name: name)
  held = {name: x for name, x in held.items() if not _OTHERS.match(name)}
  return model, param_mapping.convert_from_hf(clip.HF_TEXT, held, shapes["params"])


def make_clip_similarity(
  folder: str | Path, *, cut: int, batch: int = 256
) -> Similarity:
  """The cosine of texts' features; what is longer than the tower's context is cut.

  Args:
    cut: characters of what a policy says that are read, without full stops, as
      VLM-Eval (2311.11865) has it; 0: all of it, as far as CLIP reads.
    batch: texts at once.
  """
  model, params = load_text_encoder(folder)
  tokenizer = tokenization.load_tokenizer(folder)
  if tokenizer.eos_token_id != model.text.vocab - 1:
    raise ValueError(
      f"the tokenizer of {folder} ends texts with id {tokenizer.eos_token_id}, and not "
      f"with the highest of {model.text.vocab}, where CLIP's tower is read: {CLIP_SOURCE}"
    )

  def vectors(texts: Sequence[str]) -> Float[np.ndarray, "texts features"]:
    """Unit vectors; what is the same text is computed once, to have the same bits."""
    once = {t: i for i, t in enumerate(dict.fromkeys(texts))}
    distinct = [*once, *[""] * (-len(once) % batch)]
    rows = [np.zeros((0, model.features), np.float32)]
    for start in range(0, len(distinct), batch):
      read = tokenizer(
        distinct[start : start + batch],
        padding="max_length",
        truncation=True,
        max_length=model.text.context,
        return_tensors="np",
      )
      mask = read["attention_mask"].astype(bool)
      rows.append(np.asarray(_encode(model, params, read["input_ids"], mask)))
    return np.concatenate(rows)[[once[t] for t in texts]]

  def of(said: Sequence[str], others: Sequence[str]):
    read = [t.replace(".", "")[:cut] for t in said] if cut else said
    return vectors(read) @ vectors(others).T

  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  facts = {
    "version": digest.hexdigest()[:16],
    "checkpoint": Path(folder).name,
    "cut": cut,
  }
  return Similarity("clip", facts, of)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, params, tokens, mask):
  return model.apply({"params": params}, tokens, mask)
