"""GRPO in the loop: steps off the policy, beside on policy; from a collapsed policy.

The policy knows the last token alone, so that all train in seconds.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import small
from tests.helpers.rows import text_batch
from tests.methods.bigrams import EOS, NEW, PAD, START, VOCAB, Bigrams, table
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import MethodModels
from vlmrlaif_jax.methods import _rollout, grpo
from vlmrlaif_jax.sampling.generate import SampledResponses
from vlmrlaif_jax.training import alarms, loop
from vlmrlaif_jax.training.job import NO_HOOKS, Hooks, TrainingJob, TrainingSchedule
from vlmrlaif_jax.training.update import default_config, init_state, make_update

PROMPTS, SAMPLES, STEPS = 8, 8, 40


def generate(model, variables, prompts, key, *, samples, **_):
  """Every response is as long as can be."""
  rows = jnp.repeat(prompts.tokens, samples, axis=0)
  for key_of_token in jax.random.split(key, NEW):
    logits = variables["params"]["table"][rows[:, -1]]
    token = jax.random.categorical(key_of_token, logits)
    rows = jnp.concatenate([rows, token[:, None].astype(rows.dtype)], axis=1)
  mask = jnp.ones(rows.shape, bool)
  response = mask & (jnp.arange(START + NEW) >= START)
  video = jnp.zeros((len(rows), 1, 1, 1))
  return SampledResponses(
    text_batch(video, rows, mask, response), jnp.zeros(rows.shape)
  )


def even(frozen, batch):
  """The share of even tokens, by the host."""
  tokens, said = jax.device_get((batch.tokens, batch.loss_mask))
  return ((tokens % 2 == 0) & said).sum(1) / NEW, np.ones(len(tokens), bool)


def prompts(step):
  tokens = np.random.default_rng(step).integers(1, VOCAB, (PROMPTS, START))
  mask = np.ones(tokens.shape, bool)
  return text_batch(
    *map(jnp.asarray, (np.zeros((PROMPTS, 1)), tokens, mask, mask & False))
  )


def alike(frozen, batch):
  """The same score for every response."""
  return np.ones(len(batch.tokens)), np.ones(len(batch.tokens), bool)


def trained(
  folder,
  max_staleness,
  *,
  start=None,
  score=even,
  steps=STEPS,
  on_update=lambda params: None,
  hooks=NO_HOOKS,
  **settings,
):
  """The lines of metrics of a training; on_update gets the params of each update."""
  start = start or {"policy": table(0), "ref": table(0)}
  config = grpo.default_config()
  config.update(
    samples=SAMPLES, truncated_responses="keep", advantage="grpo_scalar", kl_coef=0.04
  )
  config.old_logps = "computed"  # `generate` above records none.
  config.update(settings)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(_rollout, "generate", generate)
    parts = MethodModels(policy=Bigrams, score=score)
    method = grpo.make(config, parts, max_new=NEW, stops=(EOS,), pad=PAD, vocab=VOCAB)
    tx = optax.adam(0.05)
    with StageLog(folder, "toy", steps, stream=io.StringIO()) as log:
      job = TrainingJob(
        method=method,
        params={"policy": start["policy"]},
        frozen={"policy": {}, "ref": start["ref"]},
        batch_spec=None,
        schedule=TrainingSchedule(steps, steps, max_staleness=max_staleness),
        optimizer=default_config(),
        passes={},
        alarms=alarms.default_config(),
        data=prompts,
        hooks=hooks,
      )
      jitted = jax.jit(make_update(method.loss, tx), donate_argnums=0)

      def update(state, frozen, rollout):
        on_update(jax.device_get(state.params))
        return jitted(state, frozen, rollout)

      state = init_state(job.params, tx)
      samplers = loop.make_first_samplers(state.params, job.schedule)
      loop.run_training(job, update, state, samplers, key=jax.random.key(0), log=log)
  return small.metrics(folder)


@pytest.fixture(scope="module")
def on(tmp_path_factory):
  return trained(tmp_path_factory.mktemp("on"), max_staleness=0)


@pytest.fixture(scope="module", params=[1, 2])
def staleness(request):
  return request.param


@pytest.fixture(scope="module")
def off(tmp_path_factory, staleness):
  return trained(tmp_path_factory.mktemp("off"), max_staleness=staleness)


def column(lines, name):
  return np.array([line[name] for line in lines])


def test_it_reaches_the_same_reward(on, off):
  ends = [column(lines, "reward")[-10:].mean() for lines in (on, off)]
  assert column(on, "reward")[:3].mean() < 0.6 < 0.8 < ends[0]
  assert abs(ends[0] - ends[1]) < 0.05


def test_the_ratio_is_to_the_policy_that_sampled_and_stays_near_1(on, off, staleness):
  np.testing.assert_allclose(column(on, "approx_kl"), 0, atol=1e-9)
  kl = column(off, "approx_kl")
  assert kl[0] < 1e-9 and (kl[1:] > 1e-6).all() and kl.max() < 0.05 * staleness**2
  assert column(off, "clip_fraction").mean() < 0.2


def test_staleness_is_told_off_the_policy_alone(on, off, staleness):
  want = [min(step, staleness) for step in range(STEPS)]
  assert column(off, "staleness").tolist() == want
  assert "staleness" not in on[0]


def test_tokens_are_of_the_policy_so_many_updates_before(tmp_path, staleness):
  params, tokens, steps = [], [], 6
  note = lambda step, data, info: tokens.append(np.asarray(info["tokens"])) or {}
  trained(
    tmp_path,
    staleness,
    steps=steps,
    on_update=params.append,
    hooks=Hooks(after_step=note),
  )

  def sample(step, at):
    key_of_stage, _ = jax.random.split(jax.random.key(0))  # The other one shuffles.
    key = jax.random.fold_in(key_of_stage, step)
    rows = generate(None, params[at]["policy"], prompts(step), key, samples=SAMPLES)
    return np.asarray(rows.batch.tokens)[:, START:]

  for step in range(steps):
    np.testing.assert_array_equal(tokens[step], sample(step, max(0, step - staleness)))
  assert any((tokens[step] != sample(step, step)).any() for step in range(1, steps))


@pytest.mark.parametrize("held", ["kl_coef", "entropy_coef"])
def test_a_collapsed_policy_is_pulled_back(tmp_path, held):
  # Each token is followed by the next one, with probability 0.98. The reference is
  # uniform, so KL is log(VOCAB) less the entropy.
  next_token = jnp.roll(jnp.eye(VOCAB), 1, axis=1)
  start = {
    "policy": {"params": {"table": 6.0 * next_token}},
    "ref": {"params": {"table": 0.0 * next_token}},
  }
  settings = {"kl_coef": 0.0, "entropy_coef": 0.0, held: 1.0}
  lines = trained(tmp_path, 0, start=start, score=alike, steps=20, **settings)
  assert (column(lines, "tied") == 1).all() and (column(lines, "learned") == 0).all()
  assert (column(lines, "policy_loss") == 0).all()
  entropy = column(lines, "policy_entropy")
  assert entropy[0] < 0.15 and (np.diff(entropy) > 0).all()
  assert entropy[-1] > 1.5 * entropy[0]
