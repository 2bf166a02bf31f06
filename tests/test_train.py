"""The stages that train: alike on any mesh, on rows of one layout."""

import functools
import io
import json
import shutil
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from tests.methods.roles import noisy
from vlmrlaif_jax import build, checkpoint, loop, sharding, train
from vlmrlaif_jax.data import pipeline, text
from vlmrlaif_jax.feedback import rewards
from vlmrlaif_jax.log import Log
from vlmrlaif_jax.types import Batch, Params, TrainState

MESHES = {
  "fsdp x tensor": dict(data=1, fsdp=2, tensor=2),
  "data x fsdp": dict(data=2, fsdp=2, tensor=1),
}


def run_on(settings, workdir, devices, **mesh):
  """A run on the first so many devices; models, data and features as a user's."""
  made = small.config(
    settings, sft__short_steps=1, sft__optimizer__schedule="constant", ppo__steps=1,
    ppo__batch_size=8, ppo__minibatches=2, ppo__optimizer__learning_rate=1e-3,
  )  # fmt: skip
  made.mesh.update(mesh)
  with pytest.MonkeyPatch.context() as patch:
    here = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
    patch.setattr(build.sharding, "make_mesh", here)
    return build.make(made, workdir, note=lambda text: None)


@pytest.fixture(scope="module")
def one(tiny_settings, tmp_path_factory, compiled_once):
  """A run on one device, with an SFT policy and a reward model of random weights."""
  workdir = tmp_path_factory.mktemp("one")
  run = run_on(tiny_settings, workdir, 1, data=1, fsdp=1, tensor=1)
  save(run, "sft_long", {"policy": noisy(train.initial_policy(run), 1, 0.05)})
  save(run, "rm", {"reward": noisy(train.initial_scorer(run), 2, 0.05)})
  return run


def save(run, stage, params):
  state = TrainState(jnp.int32(1), params, jnp.zeros(1))
  checkpoint.save(str(run.workdir / stage / "checkpoints"), state, 1, extra={}, keep=1)


@pytest.fixture(scope="module")
def elsewhere(one, tiny_settings, tmp_path_factory):
  """The same run on other meshes, from the same checkpoints."""

  @functools.cache
  def make(name):
    workdir = tmp_path_factory.mktemp("mesh")
    for part in ("features", "sft_long", "rm"):
      shutil.copytree(one.workdir / part, workdir / part)
    return run_on(tiny_settings, workdir, 4, **MESHES[name])

  return make


class Trained(NamedTuple):
  """What a stage gave to the loop and got from it."""

  start: Params  # NumPy.
  state: TrainState
  summary: dict


def run_stage(run, stage, program) -> Trained:
  seen = []
  real = loop.train

  def spy(**given):
    start = jax.device_get(given["state"].params)  # What is given is donated.
    seen.extend([start, real(**given)])
    return seen[1]

  folder = run.workdir / stage
  step = train.resume_step(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.loop, "train", spy)
    with Log(folder, stage, 1, resume_from=step, stream=io.StringIO()) as log:
      summary = program(run, stage, folder, log)
  return Trained(*seen, summary)


@pytest.fixture(scope="module")
def sft_on_one(one):
  return run_stage(one, "sft_short", train.sft)


@pytest.fixture(scope="module")
def ppo_on_one(one):
  return run_stage(one, "ppo", train.ppo)


@pytest.fixture(scope="module")
def trained_elsewhere(elsewhere):
  return functools.cache(
    lambda mesh, stage: run_stage(
      elsewhere(mesh), stage, train.ppo if stage == "ppo" else train.sft
    )
  )


# Meshes.


@pytest.mark.parametrize("mesh", MESHES)
def test_sft_step_does_not_depend_on_the_mesh(sft_on_one, trained_elsewhere, mesh):
  there = trained_elsewhere(mesh, "sft_short")
  chex.assert_trees_all_close(
    jax.device_get(there.state.params),
    jax.device_get(sft_on_one.state.params),
    atol=1e-4,
  )
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(),
    jax.device_get(sft_on_one.state.params),
    sft_on_one.start,
  )
  assert max(jax.tree.leaves(moved)) > 5e-4  # Else there was nothing to compare.


@pytest.mark.parametrize("mesh", MESHES)
def test_ppo_step_does_not_depend_on_the_mesh(
  one, ppo_on_one, elsewhere, trained_elsewhere, mesh
):
  there = trained_elsewhere(mesh, "ppo")
  said, said_there = samples(one), samples(elsewhere(mesh))
  assert [row["response"] for row in said_there] == [row["response"] for row in said]
  np.testing.assert_allclose(
    [row["advantage"] for row in said_there],
    [row["advantage"] for row in said],
    atol=1e-4,
  )
  chex.assert_trees_all_close(
    jax.device_get(there.state.params),
    jax.device_get(ppo_on_one.state.params),
    atol=1e-4,
  )


def samples(run):
  lines = (run.workdir / "ppo" / "samples" / "step_1.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stage", ["sft_short", "ppo"])
@pytest.mark.parametrize("mesh", MESHES)
def test_optimiser_is_sharded_as_the_params_it_is_of(trained_elsewhere, mesh, stage):
  state = trained_elsewhere(mesh, stage).state
  leaves = lambda tree: [
    (sharding.path_of(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if leaf.ndim
  ]
  params, moments = leaves(state.params), leaves(state.opt_state)
  assert len(moments) == 2 * len(params)  # Adam's two.
  for name, moment in moments:
    (owner,) = (param for path, param in params if name.endswith(path))
    assert moment.sharding.is_equivalent_to(owner.sharding, moment.ndim), name
  assert any(not param.sharding.is_fully_replicated for _, param in params)


# What is trained, and what from.


def test_sft_trains_lora_and_projector_and_leaves_the_base(one, sft_on_one):
  assert set(sft_on_one.state.params["policy"]) == {"lora", "params"}
  assert set(sft_on_one.state.params["policy"]["params"]) == {"projector"}
  projector = one.base["params"]["projector"]  # Not donated.
  chex.assert_trees_all_equal(
    jax.device_get(projector), sft_on_one.start["policy"]["params"]["projector"]
  )


def test_sft_saves_what_it_ends_with(one, sft_on_one):
  chex.assert_trees_all_equal(
    jax.device_get(train.policy_of(one, "sft_short")),
    jax.device_get(sft_on_one.state.params["policy"]),
  )


def test_second_stage_of_sft_starts_from_the_first(one, sft_on_one, tmp_path):
  shutil.copytree(one.workdir / "sft_short", tmp_path / "sft_short")
  run = one._replace(workdir=tmp_path)
  second = run_stage(run, "sft_long", train.sft)
  chex.assert_trees_all_equal(
    second.start["policy"], jax.device_get(sft_on_one.state.params["policy"])
  )


def test_reward_model_starts_from_sft_and_sees_with_its_projector(one):
  sft = train.policy_of(one, "sft_long")
  chex.assert_trees_all_equal(train.initial_scorer(one)["lora"], sft["lora"])
  chex.assert_trees_all_equal(
    train.scorer_base(one)["params"]["projector"], sft["params"]["projector"]
  )


def test_ppo_starts_from_sft_and_a_critic_from_the_reward_model(one, ppo_on_one):
  start = ppo_on_one.start
  sft = jax.device_get(train.policy_of(one, "sft_long"))
  reward = jax.device_get(train.reward_variables(one))
  chex.assert_trees_all_equal(start["policy"]["lora"], sft["lora"])
  chex.assert_trees_all_equal(start["critic"]["lora"], reward["lora"])
  assert not any(x.any() for x in jax.tree.leaves(start["critic"]["params"]["head"]))


def test_critic_head_may_be_the_reward_models(one):
  config = one.config.ppo.copy_and_resolve_references()
  config.critic_head = "reward"
  params, frozen = train._ppo_roles(one, config)
  chex.assert_trees_all_equal(
    params["critic"]["params"]["head"], frozen["reward"]["params"]["head"]
  )
  config.critic_head = "random"
  with pytest.raises(ValueError, match="critic_head must be .* not 'random'"):
    train._ppo_roles(one, config)


def test_the_reference_is_the_sft_policy_and_shares_its_base(one):
  _, frozen = train._ppo_roles(one, one.config.ppo)
  sft = train.policy_of(one, "sft_long")
  chex.assert_trees_all_equal(frozen["ref"]["lora"], sft["lora"])
  llm = one.base["params"]["llm"]["embed"]["embedding"]
  for role in ("policy", "ref", "reward", "critic"):
    assert frozen[role]["params"]["llm"]["embed"]["embedding"] is llm


def test_a_stage_that_was_not_run_is_named(one):
  with pytest.raises(FileNotFoundError, match="no checkpoint in .*never_run"):
    train.policy_of(one, "never_run")


def test_policies_are_those_that_are_there(one, ppo_on_one):
  found = train.policies(one)
  assert set(found) == {"sft", "ppo"}
  lora = jax.device_get(found["ppo"]["lora"])
  chex.assert_trees_all_equal(
    lora, jax.device_get(ppo_on_one.state.params["policy"]["lora"])
  )


# Rows of the reward model and of PPO.

TEXTS = ["Yes.", "The small red ring moves left.", "Word " * 40, ""]


@pytest.fixture(scope="module")
def examples(one):
  return one.splits.prompts[: len(TEXTS)]


@pytest.fixture(scope="module")
def ppo_rows(one, examples):
  """What a policy that says TEXTS leaves behind, laid out as generate does."""
  data, tok = one.config.data, one.tokenizer
  kept, rows, _ = pipeline.encode_examples(
    examples, tok, one.template, answered=False, response_len=0,
    video_tokens=build.video_tokens(one, one.config.model.frames),
    prompt_len=data.prompt_len,
  )  # fmt: skip
  assert len(kept) == len(TEXTS)
  widen = lambda x, fill: np.pad(
    x, [(0, 0), (0, data.response_len)], constant_values=fill
  )
  tokens, mask = widen(rows.tokens, tok.pad_token_id), widen(rows.mask, False)
  loss_mask = np.zeros_like(mask)
  for i, said in enumerate(TEXTS):
    ids = [*text.suffix_ids(tok, f" {said}"), tok.eos_token_id] if said else None
    ids = (ids or [tok.eos_token_id])[: data.response_len]
    here = slice(data.prompt_len, data.prompt_len + len(ids))
    tokens[i, here], mask[i, here], loss_mask[i, here] = ids, True, True
  video = build.stack_features(one.features, [e["video"] for e in examples])
  return Batch(video, tokens, mask, loss_mask)


def test_rows_of_reward_model_and_ppo_have_one_layout(one, examples, ppo_rows):
  scored = train._scored_batch(one, examples, TEXTS)
  for name, got, want in zip(Batch._fields, scored, ppo_rows, strict=True):
    np.testing.assert_array_equal(got, want, name)
  assert scored.loss_mask.sum(axis=1).max() == one.config.data.response_len


def test_the_same_text_scores_the_same_in_training_ppo_and_evaluation(
  one, examples, ppo_rows
):
  variables = train.reward_variables(one)
  suffix = tuple(text.suffix_ids(one.tokenizer, one.prompts.reward))
  score = rewards.reward(
    one.scorer, suffix=suffix, eos=one.tokenizer.eos_token_id, penalty=0.0,
    length_coef=0.0, longest=one.config.data.response_len,
  )  # fmt: skip
  in_ppo, _ = jax.jit(score)({"reward": variables}, jax.tree.map(jnp.asarray, ppo_rows))
  pairs = [
    {**e, "output_1": said, "output_2": "No.", "preference": 1}
    for e, said in zip(examples, TEXTS, strict=True)
  ]
  chosen = train._pairs(one, pairs, len(pairs), 0).chosen
  in_training = one.scorer.apply(variables, chosen, method="scores")
  order = pipeline.rows_of_step(len(pairs), len(pairs), seed=0, step=0)
  evaluated = train.score_texts(one, variables, examples, TEXTS)
  assert np.ptp(evaluated) > 0.01
  np.testing.assert_allclose(in_ppo, evaluated, atol=5e-5)
  np.testing.assert_allclose(in_training, evaluated[order], atol=5e-5)


def test_scores_do_not_depend_on_the_batch(one, examples):
  variables = train.reward_variables(one)
  score = functools.partial(train.score_texts, one, variables, examples, TEXTS)
  np.testing.assert_allclose(score(batch_size=3), score(batch_size=8), atol=5e-5)


def test_only_the_last_answer_is_scored(one, examples):
  history = [("Red?", "No.")]
  plain = {**examples[0], "question": "Blue?"}
  later = {**plain, "history": history}
  batch = train._scored_batch(one, [plain, later], ["No.", "No."])
  np.testing.assert_array_equal(batch.loss_mask[0], batch.loss_mask[1])
  assert batch.mask[1].sum() > batch.mask[0].sum()


def test_pairs_that_cannot_be_scored_are_told(one, examples):
  pair = {**examples[0], "output_1": "Yes.", "output_2": "No."}
  strange = {**pair, "id": "strange", "video": "/no/such.mp4"}
  long = {**pair, "id": "long", "question": "What " * 100}
  kept, problems = train._scorable(one, [pair, strange, long])
  assert kept == [pair]
  assert [problem.id for problem in problems] == ["strange", "long"]
  assert "data.prompt_len=64" in problems[1].reason


# The KL coefficient.


def adapted(one, tmp_path, *, target, stop=None):
  """PPO's metrics and last extra, its coefficient led to a target KL."""
  workdir = tmp_path / "adapted"
  if not workdir.exists():
    for part in ("sft_long", "rm"):
      shutil.copytree(one.workdir / part, workdir / part)
  config = one.config.copy_and_resolve_references()
  config.ppo.update(steps=3, save_every=1)
  config.ppo.optimizer.learning_rate = 3e-2  # So that the policy soon moves.
  config.ppo.method.update(kl_target=target, kl_horizon=10.0, kl_coef=0.5)
  run = one._replace(workdir=workdir, config=config)
  with pytest.MonkeyPatch.context() as patch:
    if stop is not None:
      real = train._told
      told = lambda *given: killed() if given[3] == stop else real(*given)
      patch.setattr(train, "_told", told)
    try:
      run_stage(run, "ppo", train.ppo)
    except Killed:
      pass
  path = workdir / "ppo" / "checkpoints"
  extra = json.loads(next(path.glob("*/extra/metadata")).read_text())
  return small.metrics(workdir / "ppo"), extra


class Killed(Exception):
  pass


def killed():
  raise Killed


def test_kl_coefficient_moves_towards_the_target(one, tmp_path):
  target = 1e-3
  lines, extra = adapted(one, tmp_path, target=target)
  coefs = [0.5, *(line["kl_coef"] for line in lines)]
  errors = [np.clip(line["kl"] / target - 1, -0.2, 0.2) for line in lines]
  want = [c * (1 + e * 8 / 10) for c, e in zip(coefs[:-1], errors, strict=True)]
  np.testing.assert_allclose(coefs[1:], want, rtol=1e-5)
  assert min(errors) < 0 < max(errors)  # Both ways were seen.
  assert extra == {"kl_coef": coefs[-1]}


def test_kl_coefficient_goes_on_where_a_killed_run_was(one, tmp_path):
  whole = adapted(one, tmp_path / "whole", target=1e-3)
  cut, extra = adapted(one, tmp_path / "cut", target=1e-3, stop=2)
  assert len(cut) == 2 and extra != {"kl_coef": 0.5}
  assert adapted(one, tmp_path / "cut", target=1e-3) == whole
