import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.planner import collectives

PROGRAM = """
HloModule test

%limit (x: s32[]) -> pred[] {
  %n = s32[] constant(32)
  ROOT %lt = pred[] compare(%x, %n), direction=LT
}

%body (x: s32[]) -> s32[] {
  %k = bf16[4]{0} custom-call(%x), custom_call_target="kernel", frontend_attributes={a={
 "settings":"{}"
}}, metadata={}
  %g = bf16[4,8]{1,0:T(8,128)} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %r = s32[] fusion(%g), kind=kLoop, calls=%inside
}

%inside (x: s32[]) -> s32[] {
  ROOT %a = f32[10]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

ENTRY %main (x: s32[]) -> s32[] {
  %p = (bf16[6]{0}, bf16[6]{0}, u32[], u32[]) collective-permute-start(%x)
  %d = bf16[6]{0} collective-permute-done(%p)
  %s = f32[2]{0} reduce-scatter(%d), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %w = s32[] while(%s), condition=%limit, body=%body
}
"""


def found(loops=None):
  return {c.kind: c for c in collectives.find_collectives(PROGRAM, 8, loops)}


def test_bytes_are_those_that_a_device_receives():
  assert found()["collective-permute"].bytes == 6 * 2
  assert found()["reduce-scatter"].bytes == 2 * 4 * 7


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs():
  gathered = found()["all-gather"]
  assert (gathered.runs, gathered.group) == (32, 4)
  assert gathered.bytes == 32 * 4 * 8 * 2 * 3 / 4


def test_a_collective_in_a_fusion_in_a_loop_is_found():
  reduced = found()["all-reduce"]
  assert reduced.runs == 32
  assert reduced.bytes == 32 * 2 * 10 * 4 / 2


def test_collectives_of_a_loop_that_has_a_name_are_told_apart():
  named = found({32: "decode"})
  assert named["all-gather"].loop == "decode"
  assert named["collective-permute"].loop == ""


def test_a_loop_of_no_known_end_is_the_one_that_has_a_name():
  """Decoding ends when all responses have."""
  program = PROGRAM.replace("direction=LT", "direction=NE")  # No limit, but a bit.
  found = {c.kind: c for c in collectives.find_collectives(program, 8, {896: "decode"})}
  gathered = found["all-gather"]
  assert (gathered.runs, gathered.loop) == (896, "decode")


@pytest.mark.parametrize(
  "groups, size",
  [
    ("mesh['axis_0'=8,'axis_1'=4] {'axis_1'}", 4),
    ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0','axis_1'}", 8),
    ("mesh['axis_0'=8,'axis_1'=2], device_ids=([2,8]T(1,0)) {'axis_0':(2)4}", 4),
  ],
)
def test_who_takes_part_may_be_told_by_axes_of_a_mesh(groups, size):
  program = PROGRAM.replace("replica_groups=[2,4]<=[8]", f"replica_groups={groups}")
  found = {c.kind: c for c in collectives.find_collectives(program, 32)}
  assert found["all-gather"].group == size


def test_a_compiled_scan_is_counted_over_its_length():
  mesh = sharding.make_mesh(data=1, fsdp=4)
  x = jax.ShapeDtypeStruct(
    (8, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))
  )
  w = jax.ShapeDtypeStruct(
    (5, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, None, "fsdp"))
  )
  whole = NamedSharding(mesh, P("fsdp"))

  def run(x, w):
    step = lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), whole), None)
    return jax.lax.scan(step, x, w)[0]

  text = jax.jit(run, out_shardings=whole).lower(x, w).compile().as_text()
  counts = [c.runs for c in collectives.find_collectives(text, 4)]
  assert counts and max(counts) == 5
