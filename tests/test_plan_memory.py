import jax
import pytest

from tests import small
from vlmrlaif_jax import plan_memory, plan_run, plan_stages, recipe, sharding


@pytest.fixture(scope="module")
def run(tiny_settings):
  mesh = sharding.make_mesh(1, 2, 2)
  return plan_run.make(small.config(tiny_settings), mesh)


@pytest.fixture(scope="module")
def stages(run):
  return {s.name: s for s in plan_stages.of_recipe(run, ["sft_short", "rm", "ppo"])}


def function(stage, name):
  return next(f for f in stage.functions if f.name == name)


def test_weights_are_what_their_shards_hold(run, stages):
  update = function(stages["sft_short"], "update")
  made = plan_memory.estimate(run, update)
  held = run.base["params"]
  rest = {name: tree for name, tree in held.items() if name != "vision"}
  each = lambda x: x.sharding.shard_shape(x.shape)
  shards = [jax.ShapeDtypeStruct(each(x), x.dtype) for x in jax.tree.leaves(rest)]
  assert made.weights == {"policy": sum(x.size * 4 for x in shards)}


def test_roles_that_share_a_base_hold_it_once(run, stages):
  weights = plan_memory.estimate(run, function(stages["ppo"], "collect")).weights
  assert weights["ref"] < 0.1 * weights["policy"]  # Its LoRA alone.
  assert weights["critic"] == 0


def test_optimiser_holds_two_moments_of_what_is_trained(run, stages):
  update = function(stages["rm"], "update")
  made = plan_memory.estimate(run, update)
  params = plan_memory.shard_bytes(update.state.params)
  assert made.optimiser == pytest.approx(3 * params, rel=0.01)


def test_more_microbatches_hold_less(run, tiny_settings):
  given = dict(sft__batch_size=8, sft__pack_len=0)
  config = small.config(tiny_settings, **given, sft__microbatches=4)
  parted = plan_run.make(config, run.mesh)
  whole = plan_run.make(small.config(tiny_settings, **given), run.mesh)
  peaks = [
    plan_memory.estimate(r, function(s, "update")).activations
    for r in (parted, whole)
    for s in plan_stages.of_recipe(r, ["sft_short"])
  ]
  assert peaks[0] < peaks[1] / 2


def test_rows_that_share_a_prompt_hold_less(run, tiny_settings):
  peaks = []
  for shared in (True, False):
    config = small.config(tiny_settings, rm__shared_prefix=shared)
    config.model.attention = "splash"
    (stage,) = plan_stages.of_recipe(plan_run.make(config, run.mesh), ["rm"])
    made = plan_memory.estimate(run, function(stage, "update"))
    peaks.append((made.data, made.activations))
  (data, activations), (twice, more) = peaks
  assert twice == 2 * data and activations < more


def test_a_cpu_copies_the_layers_that_decode(run, stages):
  decoding = plan_memory.estimate(run, function(stages["ppo"], "collect"))
  layers = run.base["params"]["llm"]["blocks"]
  assert decoding.gathered >= plan_memory.shard_bytes(layers)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded(
  tiny_settings, tmp_path, monkeypatch
):
  monkeypatch.setattr(plan_memory, "device_memory", lambda *given: 3e5)
  with pytest.raises(recipe.RecipeError) as caught:
    recipe.run(small.config(tiny_settings, ppo__batch_size=8), str(tmp_path))
  told = str(caught.value)
  assert "sft_short: update" in told or "sft_short: encode" in told
  assert "GiB" in told and "--config." in told and "plan.py --sweep" in told
  assert not (tmp_path / "features").exists()


def test_the_remedy_is_that_of_the_largest_part(run):
  memory = plan_memory.Memory({"policy": 9e9}, 1e9, 0.0, 0.0, 2e9, 0.0)
  told = plan_memory.explain(run, "ppo", "collect", memory, 8e9)
  assert "weights of policy" in told and "--config.mesh.fsdp" in told
  busy = memory._replace(activations=2e10)
  told = plan_memory.explain(run, "ppo", "update", busy, 8e9)
  assert "--config.ppo.microbatches" in told


def test_a_machine_that_fits_is_not_refused(tiny_settings):
  plan_memory.refuse(small.config(tiny_settings), ["sft_short", "rm", "ppo"])
