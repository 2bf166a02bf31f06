"""Dropout of LoRA: in imitation and preferences, with one key for each update."""

import jax
import optax
import pytest

from tests.methods import roles
from tests.methods.test_contract import GIVEN, collected, made
from vlmrlaif_jax.core.types import DROPOUT_KEY
from vlmrlaif_jax.training.update import init_state, make_update


def drop(model):
  return model.clone(llm=model.llm.clone(dropout=0.5))


PARTS = roles.PARTS._replace(
  policy=drop(roles.PARTS.policy),
  critic=drop(roles.PARTS.critic),
  reward_model=drop(roles.PARTS.reward_model),
)


def compute_loss(name, parts, seed=None):
  """The loss on the same data, with the dropout of a seed."""
  _, params, frozen, experience = collected(name)
  if seed is not None:
    frozen = {**frozen, DROPOUT_KEY: jax.random.key(seed)}
  return float(jax.jit(made(name, parts).loss)(params, frozen, experience).mean)


@pytest.mark.parametrize("name", ["sft", "rm", "dpo"])
def test_the_key_of_an_update_samples_dropout(name):
  plain = compute_loss(name, roles.PARTS)
  assert compute_loss(name, PARTS) == plain
  seeds = [compute_loss(name, PARTS, seed) for seed in (1, 1, 2)]
  assert seeds[0] == seeds[1] and len({plain, *seeds}) == 3


@pytest.mark.parametrize("name", [*GIVEN])
def test_rl_has_no_dropout(name):
  assert compute_loss(name, PARTS, 1) == compute_loss(name, roles.PARTS)


def test_each_update_and_each_part_has_a_key_that_depends_on_its_step():
  _, params, frozen, experience = collected("sft")
  keys = []

  def loss(params, frozen, part):
    jax.debug.callback(
      lambda data: keys.append(data.tolist()), jax.random.key_data(frozen[DROPOUT_KEY])
    )
    return made("sft").loss(params, frozen, part)

  tx = optax.sgd(0.0)
  update = jax.jit(make_update(loss, tx, microbatches=2, dropout_key=jax.random.key(3)))
  first = init_state(params, tx)
  second, _ = update(first, frozen, experience)
  jax.block_until_ready(update(second, frozen, experience))
  jax.block_until_ready(update(first, frozen, experience))
  jax.effects_barrier()
  seen = [tuple(key) for key in keys]
  assert len(set(seen)) == 4
  assert sorted(seen) == sorted([*set(seen), *seen[:2]])
