"""Batches of texts whose positions are counted, on one axis or on three."""

from vlmrlaif_jax.core.types import Batch


def text_positions(mask):
  """0 at the first real token, and at padding on either side; in NumPy or JAX."""
  return ((mask.cumsum(-1) - 1) * mask).astype("int32")[..., None]


def text_batch(video, tokens, mask, loss_mask):
  """A batch with text positions."""
  return Batch(video, tokens, mask, loss_mask, text_positions(mask))
