import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.data.processors.llava import count_pooled_tokens
from vlmrlaif_jax.models import projector
from vlmrlaif_jax.models.projector import Projector, pool_video

FRAMES = jnp.array([[1.0, 3.0, 5.0], [7.0, 9.0, 20.0]])[..., None]  # 2 of 3 patches.


def test_pool_puts_frames_first_then_places():
  want = [3.0, 12.0, 4.0, 6.0, 12.5]
  np.testing.assert_allclose(pool_video(FRAMES)[:, 0], want, rtol=1e-6)


def test_pool_leaves_a_single_frame_as_it_is():
  np.testing.assert_array_equal(pool_video(FRAMES[:1]), FRAMES[0])


def test_pool_keeps_the_rows_of_a_batch_apart():
  rows = jnp.stack([FRAMES, 2 * FRAMES])
  np.testing.assert_allclose(
    pool_video(rows), jnp.stack([pool_video(FRAMES), 2 * pool_video(FRAMES)])
  )


def test_pool_averages_bfloat16_in_float32():
  # In bfloat16 a running sum of ones stops at 256.
  ones = jnp.ones((2, 1000, 1), jnp.bfloat16)
  assert pool_video(ones).dtype == jnp.bfloat16
  np.testing.assert_array_equal(pool_video(ones)[:2, 0], [1.0, 1.0])


@pytest.mark.parametrize("frames, patches", [(1, 4), (3, 4), (50, 576)])
def test_pooled_tokens_is_the_length_of_what_pool_makes(frames, patches):
  shape = jax.eval_shape(pool_video, jnp.zeros((frames, patches, 2))).shape
  assert shape[0] == count_pooled_tokens(frames, patches)


def test_projector_equals_its_formula():
  x = jax.random.normal(jax.random.key(0), (5, 3))
  model = Projector(4, activation="relu")
  p = model.init(jax.random.key(1), x)["params"]
  p = jax.tree.map(lambda a: jax.random.normal(jax.random.key(2), a.shape), p)
  hidden = np.maximum(x @ p["linear_1"]["kernel"] + p["linear_1"]["bias"], 0)
  want = hidden @ p["linear_2"]["kernel"] + p["linear_2"]["bias"]
  np.testing.assert_allclose(model.apply({"params": p}, x), want, atol=1e-5)


def test_gradients_leave_the_rows_on_their_devices():
  """Or each device holds all rows, to make its own part of a matrix's gradient."""
  mesh = sharding.make_mesh(fsdp=4)
  model, x = Projector(64), jnp.zeros((8, 32, 64, 16))
  params = jax.eval_shape(model.init, jax.random.key(0), x)
  where = sharding.shard_by_rules(params, projector.SHARDING, mesh)
  loss = lambda params, x: jnp.sum(pool_video(model.apply(params, x)) ** 2)
  rows = jax.sharding.NamedSharding(mesh, sharding.BATCH_SPEC)
  with jax.set_mesh(mesh):
    step = jax.jit(jax.grad(loss), in_shardings=(where, rows), out_shardings=where)
    compiled = step.lower(params, x).compile()
  assert "[8,32,64,64]" not in compiled.as_text()
