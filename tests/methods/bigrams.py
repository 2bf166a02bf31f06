"""A policy of the last token, and given responses in groups, for the tests of GRPO.

It compiles in no time. Every test calls `give_responses` first.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.rows import text_batch
from tests.methods import roles
from vlmrlaif_jax.methods import _rollout, grpo
from vlmrlaif_jax.models.vlm import GroupStates
from vlmrlaif_jax.sampling.generate import SampledResponses

VOCAB, NEW, G, PROMPTS = 7, 6, 4, 6
EOS, PAD, START = 5, 0, 3
ROWS = G * PROMPTS
# One of group 0, all of group 2, one of group 3 have no verdict; group 4 is tied.
VALID = ~np.isin(np.arange(ROWS), [1, 8, 9, 10, 11, 12])
TIED = slice(16, 20)
LEARNED = VALID & ~np.isin(np.arange(ROWS), np.arange(ROWS)[TIED])


class Bigrams:
  """A policy by the last token, as far as methods know one."""

  @staticmethod
  def apply(variables, *groups, method, **settings):
    table = variables["params"]["table"]
    if method == "hidden_groups":
      assert settings == {"shared": True, "rngs": None}
      return GroupStates(
        table[groups[0].prompts.tokens[:, -1]], table[groups[0].tokens]
      )
    return jnp.eye(VOCAB)  # Of "head_kernel".


def table(seed):
  return {"params": {"table": jax.random.normal(jax.random.key(seed), (VOCAB, VOCAB))}}


PARAMS, FROZEN = {"policy": table(0)}, {"policy": {}, "ref": table(1)}


@functools.cache
def responses():
  """Of unequal lengths, prompts of one group alike; about half of them end in EOS."""
  rng = np.random.default_rng(0)
  tokens = rng.choice([1, 2, 3, 4, 6], (ROWS, START + NEW))
  tokens[:, :START] = np.repeat(tokens[::G, :START], G, axis=0)
  length = rng.integers(2, NEW + 1, ROWS)
  ends = rng.random(ROWS) < 0.5
  tokens[ends, START + length[ends] - 1] = EOS
  mask = np.arange(START + NEW) < START + length[:, None]
  tokens = np.where(mask, tokens, PAD)
  response = mask & (np.arange(START + NEW) >= START)
  arrays = (jnp.zeros((ROWS, 1, 1, 1)), tokens, mask, response)
  return text_batch(*map(jnp.asarray, arrays))


STOPPED = (np.asarray(responses().tokens) == EOS).any(axis=1)


@functools.cache
def scores():
  made = np.random.default_rng(1).normal(size=ROWS)
  made[TIED] = 3.0
  return np.where(VALID, made, np.nan)


def judge(frozen, batch):
  """Of the host: a plain function, that no tracer ever reaches."""
  assert not isinstance(batch.tokens, jax.core.Tracer)
  return tuple(map(np.asarray, frozen["verdict"]))


@functools.cache
def made(**settings):
  given = {"samples": G, "truncated_responses": "keep", "old_logps": "computed"}
  config = roles.config_of(grpo, **{**given, **settings})
  parts = roles.PARTS._replace(policy=Bigrams, score=judge)
  return grpo.make(config, parts, max_new=NEW, stops=(EOS,), pad=PAD, vocab=VOCAB)


def give_responses(monkeypatch):
  """Makes `generate` return the given responses."""
  given = lambda *_, **settings: SampledResponses(
    responses(), jnp.zeros((ROWS, START + NEW))
  )
  monkeypatch.setattr(_rollout, "generate", given)


def collected(verdict=None, **settings):
  """(rollout, info), in NumPy."""
  frozen = {**FROZEN, "verdict": verdict or (scores(), VALID)}
  out = made(**settings).collect(jax.random.key(0), PARAMS, frozen, responses())
  return jax.tree.map(np.asarray, out)


def loss_and_grads(rollout, params=PARAMS, **settings):
  loss = made(**settings).loss
  rollout = jax.tree.map(jnp.asarray, rollout)

  def total(params):
    found = loss(params, FROZEN, rollout)
    return found.mean, found

  (_, found), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  return found, grads


def groups(x):
  return x.reshape(PROMPTS, G, *x.shape[1:])


def learned(rollout):
  """The responses that are compared: those of the policy loss."""
  return rollout.policy_weights.any(axis=2).reshape(-1)


def pulled(rollout):
  """The responses that count in KL and entropy."""
  return rollout.groups.loss_mask.any(axis=2).reshape(-1)


def in_numpy(variables):
  """(log-probability, entropy) of each token."""
  rows = np.asarray(variables["params"]["table"], np.float64)
  logps = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
  entropy = -(np.exp(logps) * logps).sum(axis=1)
  tokens = np.asarray(responses().tokens)
  first = lambda x: np.concatenate([np.zeros((ROWS, 1)), x], axis=1)
  before, after = tokens[:, :-1], tokens[:, 1:]
  return first(logps[before, after]), first(entropy[before])
