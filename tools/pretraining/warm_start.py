"""Starts a Qwen3-VL from a base model in LLaVA-1.5's layout, which saves training.

The layers of both towers have the same shapes, as have those of both language models.
What differs is approximated, and training corrects it: the tower's first norm is folded
into its patches, norms of queries and keys get constant scales, and each new token
starts as the mean of the old tokens of its text.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from tools.pretraining import qwen_tokenizer
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data.tokenization import PreTrainedTokenizerBase
from vlmrlaif_jax.models import clip

EOS, BOS = "</s>", "<s>"  # Special tokens of the old tokenizer.
SPECIAL = {qwen_tokenizer.END: EOS, qwen_tokenizer.START: BOS}


def start_tower(
  new: Params,
  old: Params,
  frames: UInt8[np.ndarray, "images height width 3"],
) -> Params:
  """Returns the parameters of a tower, with mergers that stay random.

  Args:
    new: Random parameters of the new tower.
    old: Parameters of CLIP's tower, with patches of the same size.
    frames: Frames by which the tower's first norm is approximated.
  """
  blocks = dict(old["blocks"])
  join = lambda leaf: np.concatenate([blocks[x][leaf] for x in "qkv"], axis=-1)
  joined = {"qkv": {leaf: join(leaf) for leaf in ("kernel", "bias")}}
  rest = {name: value for name, value in blocks.items() if name not in "qkv"}
  kernel, bias, positions = _fold_first_norm(old, frames)
  return {
    **new,
    "blocks": {**rest, **joined},
    "patch": {
      "kernel": _cover_two_frames(kernel, np.asarray(new["patch"]["kernel"])),
      "bias": bias,
    },
    "position_embedding": positions,
  }


def _fold_first_norm(old, frames):
  """Returns (kernel, bias, positions) for pixels from -1 to 1.

  A layer norm divides by the standard deviation of each patch. This is replaced by its
  mean over frames.
  """
  mean, std = (
    np.tile(x, len(old["patch"]["kernel"]) // 3) for x in (clip.MEAN, clip.STD)
  )
  kernel = np.asarray(old["patch"]["kernel"])
  bias = ((0.5 - mean) / std) @ kernel
  kernel = (0.5 / std)[:, None] * kernel
  positions = np.asarray(old["position_embedding"])[1:]
  patch = round((len(kernel) // 3) ** 0.5)
  pixels = jnp.asarray(frames / np.float32(127.5) - 1)
  cut = np.asarray(clip.cut_patches(pixels, frames.shape[1], patch))
  spread = (cut @ kernel + bias + positions).std(axis=-1).mean()
  scale, shift = (np.asarray(old["pre_norm"][x]) for x in ("scale", "bias"))
  center = lambda x: (x - x.mean(axis=-1, keepdims=True)) / spread * scale
  folded = center(kernel), center(bias) + shift, center(positions)
  return tuple(x.astype(np.float32) for x in folded)


def _cover_two_frames(
  kernel: Float[np.ndarray, "old embed"], random: Float[np.ndarray, "channels embed"]
) -> Float[np.ndarray, "channels embed"]:
  """Returns a kernel of the mean of two frames, plus a random one of their change."""
  side, embed = round((len(kernel) // 3) ** 0.5), kernel.shape[1]
  own = kernel.reshape(side, side, 3, embed).transpose(2, 0, 1, 3)
  change = random.reshape(3, 2, side, side, embed)[:, 0]
  both = np.stack([own / 2 - change, own / 2 + change], axis=1)
  return both.reshape(-1, embed).astype(np.float32)


def start_llm(
  new: Params,
  old: Params,
  tok: PreTrainedTokenizerBase,
  old_tok: PreTrainedTokenizerBase,
) -> Params:
  """Returns the parameters of a Qwen3 from those of a LLaMA of the same shapes.

  Args:
    new: Random parameters of the Qwen3.
    old: Parameters of the LLaMA.
    tok: Tokenizer of the Qwen3.
    old_tok: Tokenizer of the LLaMA.
  """
  blocks = dict(old["blocks"])
  for name in "qk":
    shape = new["blocks"][f"{name}_norm"]["scale"].shape
    scales = _measure_outputs(blocks[name]["kernel"], blocks["attention_norm"]["scale"])
    blocks[f"{name}_norm"] = {"scale": np.broadcast_to(scales[:, None], shape).copy()}
  sources = [_list_old_tokens(tok, old_tok, i) for i in range(len(tok))]
  mean = lambda rows: np.stack([np.asarray(rows)[ids].mean(axis=0) for ids in sources])
  return {
    "blocks": blocks,
    "norm": old["norm"],
    "embed": {"embedding": mean(old["embed"]["embedding"])},
    "lm_head": {"kernel": mean(np.asarray(old["lm_head"]["kernel"]).T).T},
  }


def _measure_outputs(
  kernels: Float[np.ndarray, "layers embed outputs"],
  scales: Float[np.ndarray, "layers embed"],
) -> Float[np.ndarray, " layers"]:
  """Returns the root mean square of outputs, for inputs of unit variance and scales."""
  power = np.square(np.asarray(kernels) * np.asarray(scales)[..., None]).sum(axis=1)
  return np.sqrt(power.mean(axis=-1)).astype(np.float32)


def _list_old_tokens(tok, old_tok, i: int) -> list[int]:
  """Returns the ids of the old tokens of the text of a token."""
  text = tok.decode([i])
  text = SPECIAL.get(text, text)
  ids = old_tok.encode(text, add_special_tokens=False)
  return ids or [old_tok.pad_token_id]


def start(
  new: Params,
  old: Params,
  tok: PreTrainedTokenizerBase,
  old_tok: PreTrainedTokenizerBase,
  frames: UInt8[np.ndarray, "images height width 3"],
) -> Params:
  """Returns the parameters of a Qwen3-VL; see `start_tower` and `start_llm`."""
  return {
    **new,
    "vision": start_tower(new["vision"], old["vision"], frames),
    "llm": start_llm(new["llm"], old["llm"], tok, old_tok),
  }
