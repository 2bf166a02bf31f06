"""The weights of each role: as a stage starts with them, and as it leaves them."""

import jax
import jax.numpy as jnp

from vlmrlaif_jax import build, checkpoint
from vlmrlaif_jax.types import Params, join

SFT = ("sft_short", "sft_long")  # The curriculum, in order.
RL = ("ppo", "grpo")  # Each starts from SFT and trains the policy's LoRA.


def initial_policy(run: build.Run) -> Params:
  """What SFT trains, as it starts: LoRA that changes nothing, the base's projector."""
  key = jax.random.fold_in(jax.random.key(run.config.seed), 1)
  lora = build.fresh(build.trainable(run.policy, run.mesh), key)["lora"]
  return {"lora": lora, "params": _projector(run)}


def _projector(run) -> Params:
  return {"projector": run.base["params"]["projector"]}


def policy_of(run: build.Run, stage: str) -> Params:
  """The trained part of the policy, as a stage left it.

  Raises:
    FileNotFoundError: the stage has not been run in this workdir.
  """
  lora = build.trainable(run.policy, run.mesh)
  like = {"policy": {**lora, "params": _projector(run)}}
  if stage in RL:
    like = {"policy": lora}
  if stage == "ppo":
    like["critic"] = build.trainable(run.scorer, run.mesh)
  saved = checkpoint.restore_params(str(run.workdir / stage / "checkpoints"), like)
  return saved["policy"]


def policies(run: build.Run) -> dict[str, Params]:
  """Whole variables of the SFT policy, and of those that RL has made of it."""
  reference = join(run.base, policy_of(run, SFT[1]))
  there = [stage for stage in RL if _exists(run, stage)]
  return {"sft": reference} | {s: join(reference, policy_of(run, s)) for s in there}


def _exists(run, stage: str) -> bool:
  return checkpoint.latest_step(str(run.workdir / stage / "checkpoints")) is not None


def has_reward_model(run: build.Run) -> bool:
  return _exists(run, "rm")


def initial_scorer(run: build.Run) -> Params:
  """What the reward model trains, as it starts: the SFT policy's LoRA where both have
  the same base, and a head of small random weights."""
  key = jax.random.fold_in(jax.random.key(run.config.seed), 2)
  start = build.fresh(build.trainable(run.scorer, run.mesh), key)
  if run.scorer_base is run.base:
    start["lora"] = policy_of(run, SFT[1])["lora"]
  return start


def scorer_base(run: build.Run) -> Params:
  """The frozen part of reward model and critic; SFT's projector, if it is theirs."""
  if run.scorer_base is not run.base:
    return run.scorer_base
  projector = policy_of(run, SFT[1])["params"]
  return join(run.base, {"params": projector})


def reward_variables(run: build.Run) -> Params:
  """Whole variables of the trained reward model."""
  like = {"reward": build.trainable(run.scorer, run.mesh)}
  saved = checkpoint.restore_params(str(run.workdir / "rm" / "checkpoints"), like)
  return join(scorer_base(run), saved["reward"])


def ppo_roles(run: build.Run, critic_head: str) -> tuple[Params, Params]:
  """(what is trained, what is frozen); the roles share the arrays of their base.

  Args:
    critic_head: "reward": the critic starts from the reward model's head; "zero".
  """
  params, frozen = grpo_roles(run)
  reward = reward_variables(run)
  critic = {"lora": reward["lora"], "params": {"head": reward["params"]["head"]}}
  if critic_head == "zero":
    critic["params"] = jax.tree.map(jnp.zeros_like, critic["params"])
  elif critic_head != "reward":
    raise ValueError(f'ppo.critic_head must be "zero" or "reward", not {critic_head!r}')
  roles = {"reward": reward, "critic": scorer_base(run)}
  return params | {"critic": critic}, frozen | roles


def grpo_roles(run: build.Run) -> tuple[Params, Params]:
  """(what is trained, what is frozen): the policy, and itself as the reference."""
  start = policy_of(run, SFT[1])
  base = join(run.base, {"params": start["params"]})
  lora = {"lora": start["lora"]}
  return {"policy": lora}, {"policy": base, "ref": join(base, lora)}
