"""The loss of pretraining, over a model of random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.methods import roles
from tools.pretraining import convert_clip, method
from vlmrlaif_jax.core.types import VIDEO_TOKEN, MethodModels
from vlmrlaif_jax.models import clip_text
from vlmrlaif_jax.training.update import init_state, make_update

TEXT = dict(vocab=64, context=16, embed=32, mlp=64, layers=2, heads=4)
CLIP = convert_clip.CLIP(roles.TOWER, clip_text.TextTower(**TEXT), 8)


def packed():
  """A row each: a video, then what is said of a third of it, then of all of it."""
  rng = np.random.default_rng(0)
  whole, third, said = 3 + 16, 16, 4  # Tokens; the third is one frame.
  text = lambda: list(rng.integers(3, 60, said))
  head, clip_row = [1, *[VIDEO_TOKEN] * whole], [1, *[VIDEO_TOKEN] * third]
  tokens = np.array([head + clip_row + text() + text() for _ in range(roles.ROWS)])
  sizes = [len(head), len(clip_row) + said, said]
  starts = [0, 0, len(head)]
  positions = np.concatenate(
    [at + np.arange(n) for at, n in zip(starts, sizes, strict=True)]
  )
  learn = np.arange(tokens.shape[1]) >= tokens.shape[1] - 2 * said
  every = lambda row: jnp.asarray(np.tile(row, (roles.ROWS, 1)))
  shape = (roles.ROWS, 3, 16, 16, 3)
  return method.PretrainBatch(
    video=jnp.asarray(rng.integers(0, 256, shape), jnp.uint8),
    third=jnp.asarray(rng.integers(0, 3, roles.ROWS)),
    tokens=jnp.asarray(tokens),
    segments=every(np.repeat(np.arange(3), sizes)),
    positions=every(positions)[..., None],
    weights=every(learn.astype(np.float32)),
    frame=jnp.asarray(rng.integers(0, 3, roles.ROWS)),
    caption=jnp.asarray(rng.integers(3, 60, (roles.ROWS, 16))),
    caption_mask=jnp.ones((roles.ROWS, 16), bool),
  )


@functools.cache
def pretrain_roles():
  """(params, frozen) of the method, which trains everything."""
  batch = packed()
  _, frozen = roles.roles()
  both = jax.jit(CLIP.init)(
    jax.random.key(1), batch.video[:, 0], batch.caption, batch.caption_mask
  )["params"]
  rest = {name: tree for name, tree in both.items() if name != "vision"}
  return {"vlm": frozen["policy"]["params"], "clip": rest}, {}


def test_loss_falls():
  made = method.make(
    method.default_config(), MethodModels(policy=roles.MODEL, critic=CLIP)
  )
  params, frozen = pretrain_roles()
  tx, losses = optax.adam(3e-3), []
  step = jax.jit(make_update(made.loss, tx))
  state = init_state(params, tx)
  for _ in range(6):
    state, metrics = step(state, frozen, packed())
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.01 * abs(losses[0]), losses
