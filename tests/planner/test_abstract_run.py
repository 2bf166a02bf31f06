"""What is planned is what is run: the same functions of the same shapes and places."""

import jax
import pytest

from tests.helpers import small, stage_runs
from vlmrlaif_jax.core import sharding
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.types import Frozen, PackedBatch
from vlmrlaif_jax.feedback.pairwise_judge import JudgeQuery
from vlmrlaif_jax.planner import abstract_run
from vlmrlaif_jax.runtime import answering, workloads
from vlmrlaif_jax.stages.stage import load_stages
from vlmrlaif_jax.training import loop


def shapes(tree):
  """Paths, shapes, dtypes and places of a tree's arrays; an array that stands twice
  stands here once.
  """
  tree = Frozen({"": tree})
  # A number goes wherever it is wanted.
  place = lambda x: (x.shape, x.dtype, x.sharding.spec if x.ndim else None)
  return sorted(
    (sharding.format_key_path(path), *map(str, place(x)))
    for path, x in jax.tree_util.tree_leaves_with_path(dict(tree))
  )


def planned(run, stage):
  again = abstract_run.create_abstract_run(run.config, run.mesh)
  (made,) = abstract_run.plan_recipe_stages(again, [stage])
  return {f.name: f for f in made.workload.functions}


def ran(run, stage, folder):
  """What a stage gave to collect and to its first update."""
  seen = {}

  def stop(job, update, state, samplers, **given):
    seen.update(state=state, frozen=job.frozen, data=job.data(0))
    raise InterruptedError

  with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
    patch.setattr(loop, "run_training", stop)
    stage_runs.run_stage(run, stage, folder)
  return seen


@pytest.mark.parametrize("stage", ["sft_short", "rm", "ppo", "grpo", "dpo"])
def test_a_stage_is_planned_as_it_runs(one, tmp_path, stage):
  config = one.config.copy_and_resolve_references()
  config.dpo.update(preferences=config.rm.preferences, batch_size=4)
  one = one._replace(config=config)
  real = ran(one, stage, tmp_path / stage)  # The run's own folder holds checkpoints.
  made = planned(one, stage)
  state, frozen, data = made["update"].args()
  assert shapes(state) == shapes(real["state"])
  assert shapes(dict(frozen)) == shapes(real["frozen"])
  if "collect" in made:
    data = made["collect"].args()[-1]
  if isinstance(data, PackedBatch):  # How many rows there are, depends on the data.
    rows, _ = data.tokens.shape
    assert rows == 2  # Four examples of 112 tokens at most, in rows of 256.
    data = PackedBatch(
      *(x.update(shape=y.shape) for x, y in zip(data, real["data"], strict=True))
    )
  assert shapes(data) == shapes(real["data"])


@pytest.mark.parametrize("count", [3, 9])
def test_answers_are_planned_as_they_are_asked_for(one, monkeypatch, count):
  seen = {}

  def stop(model, settings, variables, batch, key, ids):
    seen.update(variables=variables, batch=batch, ids=ids, **dict(settings))
    raise InterruptedError

  monkeypatch.setattr(answering, "_sample", stop)
  sampling = answering.read_sampling_settings(one.config, "evaluate")._replace(
    batch=4, samples=2
  )
  example = one.splits.benchmark[0]
  asked = [JudgeQuery(str(i), example["video"], "Which?") for i in range(count)]
  with pytest.raises(InterruptedError):
    answering.answer_requests(one, one.base, asked, sampling, seed=0)
  batches = 1 if count <= 4 else answering.BATCHES
  made = workloads.make_answer_function(
    one, one.base, "answers", sampling, runs=1.0, batches=batches
  )
  variables, batch, _, ids = made.args()
  assert shapes(batch) == shapes(seen["batch"])
  assert shapes(variables) == shapes(seen["variables"])
  assert ids.shape == seen["ids"].shape
  (_, decodes) = made.passes[""]
  assert decodes.rows / decodes.parts == seen["slots"]


@pytest.mark.parametrize("stage, names", [("ppo", 3), ("grpo", 3)])
def test_what_collect_jits_goes_by_the_names_of_its_passes(one, stage, names):
  collect = planned(one, stage)["collect"]
  traced = jax.make_jaxpr(collect.call)(*collect.args())
  jitted = [e.params["name"] for e in traced.eqns if e.primitive.name == "jit"]
  assert jitted == list(collect.passes) and len(jitted) == names


def test_a_reward_without_the_reward_model_plans_no_scores(one):
  config = one.config.copy_and_resolve_references()
  config.reward.terms.reward_model.weight = 0.0
  run = one._replace(config=config)
  for stage in ("ppo", "grpo"):
    collect = planned(run, stage)["collect"]
    traced = jax.make_jaxpr(collect.call)(*collect.args())
    jitted = [e.params["name"] for e in traced.eqns if e.primitive.name == "jit"]
    assert jitted == list(collect.passes) == ["sample", "prepare_rollout"]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_rollouts_on_servers_plan_no_sampling(one, stage):
  config = one.config.copy_and_resolve_references()
  here = planned(one, stage)
  config[stage].rollout.engine = "vllm"
  made = planned(one._replace(config=config), stage)
  collect = made["collect"]
  assert list(collect.passes) == ["score", "prepare_rollout"]
  assert collect.responses == 0
  assert {p.phase for each in collect.passes.values() for p in each} == {"forward"}
  traced = jax.make_jaxpr(collect.call)(*collect.args())
  jitted = [e.params["name"] for e in traced.eqns if e.primitive.name == "jit"]
  assert jitted == list(collect.passes)
  # The update has the same shapes, wherever the responses come from.
  assert shapes(made["update"].args()[-1]) == shapes(here["update"].args()[-1])


def test_a_step_learns_from_groups_that_share_their_prompts(one):
  made = planned(one, "grpo")
  config, ((learned,),) = one.config.grpo, made["update"].passes.values()
  assert (learned.rows, learned.group) == (config.batch_size // 2, config.samples)
  assert [p.role for p in made["collect"].passes["prepare_rollout"]] == ["ref"]
  tokens = made["update"].args()[-1].groups.tokens
  assert tokens.shape == (learned.rows, learned.group, learned.time - learned.start)


def test_every_stage_is_planned_but_those_that_only_measure():
  unplanned = {name for name, stage in load_stages().items() if not stage.workload}
  assert unplanned == {"judges"}


def test_a_published_model_is_planned_without_its_checkpoint(tiny_settings):
  config = small.config(tiny_settings, model__path="nowhere", model__size="llava_7b")
  run = abstract_run.create_abstract_run(config, sharding.make_mesh(1, 4, 1))
  count = sum(x.size for x in jax.tree.leaves(run.base["params"]["llm"]))
  assert count == 6_738_415_616  # Of Llama 2 7B.


def test_a_model_that_is_not_known_is_refused(tiny_settings):
  config = small.config(tiny_settings, model__path="nowhere")
  with pytest.raises(UserError, match="llava_13b"):
    abstract_run.create_abstract_run(config, sharding.make_mesh())


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llava_next_video"])
def test_a_config_of_another_family_is_an_error_that_names_it(
  tiny_settings, tmp_path, model_type
):
  (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
  config = small.config(tiny_settings, model__path=str(tmp_path))
  with pytest.raises(ValueError, match=f"model_type must be .* got '{model_type}'"):
    abstract_run.create_abstract_run(config, sharding.make_mesh())
