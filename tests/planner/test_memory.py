import re

import jax
import pytest

from tests.helpers import onevision, qwen, small
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import Frozen
from vlmrlaif_jax.planner import abstract_run
from vlmrlaif_jax.planner import compile as compile_lib
from vlmrlaif_jax.planner import memory as memory_lib
from vlmrlaif_jax.recipes import runner
from vlmrlaif_jax.stages.stage import load_stages


@pytest.fixture(scope="module")
def run(tiny_settings):
  mesh = sharding.make_mesh(1, 2, 2)
  return abstract_run.create_abstract_run(small.config(tiny_settings), mesh)


@pytest.fixture(scope="module")
def stages(run):
  return {
    s.name: s for s in abstract_run.plan_recipe_stages(run, ["sft_short", "rm", "ppo"])
  }


def function(stage, name):
  return next(f for f in stage.workload.functions if f.name == name)


def estimate(run, stage, name):
  return memory_lib.estimate_memory(run, stage, function(stage, name))


def shards(tree):
  """Bytes of a device, by a plain sum."""
  each = lambda x: x.sharding.shard_shape(x.shape)
  made = [jax.ShapeDtypeStruct(each(x), x.dtype) for x in jax.tree.leaves(tree)]
  return sum(x.size * x.dtype.itemsize for x in made)


def test_weights_are_what_their_shards_hold(run, stages):
  made = estimate(run, stages["sft_short"], "update")
  held = dict(run.base["params"])
  tower = held.pop("vision")
  assert made.weights == {"policy": shards(held), "resident": shards(tower)}


def test_roles_that_share_a_base_hold_it_once(run, stages):
  weights = estimate(run, stages["ppo"], "collect").weights
  assert weights["ref"] < 0.1 * weights["policy"]  # Its LoRA alone.
  assert weights["critic"] == 0


def test_optimiser_holds_two_moments_of_what_is_trained(run, stages):
  made = estimate(run, stages["rm"], "update")
  params = shards(function(stages["rm"], "update").state.params)
  assert made.optimizer == pytest.approx(3 * params, rel=0.01)


@pytest.fixture(scope="module")
def apart(run):
  """A reward model and critic that share no weights with the policy."""
  return run._replace(reward_model_base=jax.tree.map(lambda x: x.update(), run.base))


def test_weights_that_a_function_does_not_read_wait_beside_it(apart):
  ppo, sft = abstract_run.plan_recipe_stages(apart, ["ppo", "sft_short"])
  other = shards(apart.reward_model_base)
  # The reward model's and the critic's are read by `collect`; not by SFT.
  assert estimate(apart, sft, "update").weights["resident"] > other
  assert estimate(apart, ppo, "collect").weights["resident"] < other
  moments = shards(function(ppo, "update").state.opt_state)
  assert estimate(apart, ppo, "collect").weights["resident"] > moments
  held = [estimate(apart, ppo, name) for name in ("collect", "update")]
  collects, updates = [sum(m.weights.values()) + m.optimizer for m in held]
  assert collects == updates


@pytest.mark.parametrize("engine", ["jax", "vllm"])
def test_rollouts_ahead_hold_parameters_prompts_and_responses(
  run, tiny_settings, engine
):
  def plan(ahead):
    rollout = {"ppo.rollout.max_staleness": ahead, "ppo.rollout.engine": engine}
    again = run._replace(config=small.config(tiny_settings | rollout))
    (stage,) = abstract_run.plan_recipe_stages(again, ["ppo"])
    return stage, estimate(again, stage, "update")

  (stage, on), (_, off), (_, far) = map(plan, (0, 1, 3))
  collect = function(stage, "collect")
  _, params, _, prompts = collect.args()
  one_more = off.peak - on.peak
  assert far.peak - on.peak == 3 * one_more
  # Responses contain the features of their prompts.
  assert one_more > shards(params) + shards(prompts) + shards(prompts.video)
  assert one_more < shards(params) + 4 * shards(prompts)


def test_videos_are_encoded_before_a_stage_has_anything(run, stages):
  weights = estimate(run, stages["ppo"], "encode").weights
  assert sum(weights.values()) == shards(run.base)


def test_a_compiled_program_holds_what_waits_as_well(apart):
  (ppo,) = abstract_run.plan_recipe_stages(apart, ["ppo"])
  collect = function(ppo, "collect")
  _, params, frozen, prompts = collect.args()
  given = jax.tree.leaves((params, frozen["policy"], prompts))
  size = shards(given)
  samples = compile_lib.CompiledProgram(
    "sample", size + 100, size, [], [], 0.0, placed_args=tuple(given)
  )
  state = function(ppo, "update").state
  everything = (
    *apart.base.values(),
    *apart.reward_model_base.values(),
    state,
    frozen["ref"],
  )
  whole = Frozen({"": (everything, frozen["reward"], prompts)})
  held = memory_lib.count_peak_bytes(apart, ppo, collect, samples)
  assert held == pytest.approx(shards(whole) + 100, abs=8)  # And a coefficient.
  refused = samples._replace(peak=9e9, refused="too much")
  assert memory_lib.count_peak_bytes(apart, ppo, collect, refused) == 9e9


def test_more_microbatches_hold_less(run, tiny_settings):
  given = dict(sft__batch_size=8, sft__pack_len=0)
  config = small.config(tiny_settings, **given, sft__microbatches=4)
  parted = abstract_run.create_abstract_run(config, run.mesh)
  whole = abstract_run.create_abstract_run(
    small.config(tiny_settings, **given), run.mesh
  )
  peaks = [
    estimate(r, s, "update").activations
    for r in (parted, whole)
    for s in abstract_run.plan_recipe_stages(r, ["sft_short"])
  ]
  assert peaks[0] < peaks[1] / 2


def test_rows_that_share_a_prompt_hold_less(run, tiny_settings):
  peaks = []
  for shared in (True, False):
    config = small.config(tiny_settings, rm__shared_prefix=shared)
    config.model.attention = "splash"
    (stage,) = abstract_run.plan_recipe_stages(
      abstract_run.create_abstract_run(config, run.mesh), ["rm"]
    )
    made = estimate(run, stage, "update")
    peaks.append((made.videos, made.activations))
  (videos, activations), (twice, more) = peaks
  assert twice == 2 * videos and activations < more


def test_a_cpu_copies_the_layers_that_decode(run, stages):
  decoding = estimate(run, stages["ppo"], "collect")
  layers = run.base["params"]["llm"]["blocks"]
  assert decoding.gathered >= memory_lib.count_shard_bytes(layers)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded(
  tiny_settings, tmp_path, monkeypatch
):
  monkeypatch.setattr(memory_lib, "get_device_memory", lambda *given: 3e5)
  with pytest.raises(UserError) as caught:
    runner.run_recipe(small.config(tiny_settings, ppo__batch_size=8), str(tmp_path))
  told = str(caught.value)
  assert "sft_short: update" in told or "sft_short: encode" in told
  assert "GiB" in told and "--config." in told and "plan.py --sweep" in told
  assert not (tmp_path / "features").exists()


def test_a_family_whose_videos_differ_is_refused_as_well(
  tmp_path, tiny_settings, monkeypatch
):
  qwen.write_checkpoint(tmp_path)
  lengths = {"data__prompt_len": 256, "model__template": "chat_template"}
  config = small.config(tiny_settings, model__path=str(tmp_path), **lengths)
  memory_lib.check_memory(config, ["sft_short"])
  monkeypatch.setattr(memory_lib, "get_device_memory", lambda *_: 1e4)
  with pytest.raises(UserError, match="sft_short: .* would hold"):
    memory_lib.check_memory(config, ["sft_short"])


def compare_peaks(folder, **more):
  """Returns the peaks of an SFT update, estimated and by the compiler, in bytes.

  The models are tiny, so activations are most of them. See docs/planning.md.
  """
  lengths = dict(data__prompt_len=128, data__response_len=192, sft__pack_len=512)
  config = small.config(small.settings(folder, folder), **lengths, **more)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  run = abstract_run.create_abstract_run(config, mesh)
  (stage,) = abstract_run.plan_recipe_stages(run, ["sft_short"])
  update = function(stage, "update")
  cache, note = folder / "cache", lambda line: None
  (program,) = compile_lib.compile_all(run, update, cache, note)
  found = memory_lib.count_peak_bytes(run, stage, update, program)
  return estimate(run, stage, "update").peak, found


@pytest.mark.parametrize("family", [qwen, onevision])
def test_the_estimate_of_a_family_is_near_the_compilers_peak(tmp_path, family):
  family.write_checkpoint(tmp_path)
  estimated, found = compare_peaks(tmp_path, model__template="chat_template")
  assert 0.75 < found / estimated < 1.25


def test_the_remedy_is_that_of_the_largest_part(run):
  memory = memory_lib.MemoryEstimate({"policy": 9e9}, 1e9, 0.0, 0.0, 2e9, 0.0)
  told = memory_lib.explain_misfit(run, "ppo", "collect", memory, 8e9)
  assert "weights of policy" in told and "--config.mesh.fsdp" in told
  busy = memory._replace(activations=2e10)
  told = memory_lib.explain_misfit(run, "ppo", "update", busy, 8e9)
  assert "--config.ppo.microbatches" in told


PARTS = (
  dict(weights={"policy": 9e9}),
  *({part: 9e9} for part in ("optimizer", "cache", "videos", "activations")),
  dict(gathered=9e9),
)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: next(iter(part)))
def test_a_remedy_names_settings_that_there_are(run, part):
  sizes = memory_lib.MemoryEstimate({"policy": 0}, 0, 0, 0, 0, 0)._replace(**part)
  planned = [name for name, stage in load_stages().items() if stage.workload]
  assert len(planned) > 8
  for name in planned:
    told = memory_lib.list_advice(run, name, sizes)
    named = re.findall(r"--config\.(\w+)\.(\w+)", told)
    assert named and all(key in run.config[section] for section, key in named), told


def test_a_machine_that_fits_is_not_refused(tiny_settings):
  memory_lib.check_memory(small.config(tiny_settings), ["sft_short", "rm", "ppo"])


def test_heads_that_tensor_does_not_divide_are_refused_for_splash(tiny_settings):
  config = small.config(tiny_settings)
  config.mesh.update(fsdp=1, tensor=4)
  memory_lib.check_memory(config, [])
  config.model.attention = "splash"
  with pytest.raises(UserError, match="has 2 key and value heads, .*mesh.tensor=4"):
    memory_lib.check_memory(config, [])
