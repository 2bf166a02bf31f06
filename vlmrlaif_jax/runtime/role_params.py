"""The weights of each role: as a stage starts with them, and as it leaves them."""

from collections.abc import Iterable

import jax

from vlmrlaif_jax.core.stage_log import split_round
from vlmrlaif_jax.core.types import Params, merge_params
from vlmrlaif_jax.runtime.arrays import get_trainable_shapes
from vlmrlaif_jax.runtime.run import Run

SFT_STAGES = ("sft_short", "sft_long")  # The curriculum, in order.
DPO_STAGE = "dpo"  # In rounds, "dpo_1" starts from SFT and "dpo_2" from "dpo_1".
CRITIC_HEADS = ("zero", "reward")  # What a critic's head starts as.
# Judges by name: the stage that made each. All have the LoRA of a policy.
JUDGE_STAGES = {"sft": SFT_STAGES[1], "grm_sft": "grm_sft", "grm": "grm"}


def init_policy(run: Run) -> Params:
  """What SFT trains, as it starts: LoRA that changes nothing, the base's projector."""
  key = jax.random.fold_in(jax.random.key(run.config.seed), 1)
  lora = run.arrays.initialize(get_trainable_shapes(run.policy, run.mesh), key)["lora"]
  return {"lora": lora, "params": _projector(run)}


def _projector(run: Run) -> Params:
  return {"projector": run.base["params"]["projector"]}


def load_policy(run: Run, stage: str) -> Params:
  """The trained part of the policy, as a stage left it.

  Raises:
    UserError: the stage has not been run in this workdir.
  """
  lora = get_trainable_shapes(run.policy, run.mesh)
  like = {"policy": {**lora, "params": _projector(run)}}
  if stage not in SFT_STAGES:
    like = {"policy": lora}
  return run.arrays.restore(run.workdir / stage, like)["policy"]


def load_policy_variables(run: Run, stage: str) -> Params:
  """Returns whole variables of the policy as a stage left it."""
  if stage in SFT_STAGES:
    return merge_params(run.base, load_policy(run, stage))
  # RL leaves the projector as SFT made it.
  return merge_params(
    load_policy_variables(run, SFT_STAGES[1]), load_policy(run, stage)
  )


def load_all_policies(run: Run, stages: Iterable[str]) -> dict[str, Params]:
  """Returns whole variables of the SFT policy and of the policies that stages left.

  Args:
    run: the run whose workdir has them.
    stages: names of stages that train SFT's policy further; see stage.policy_stages.
  """
  reference = load_policy_variables(run, SFT_STAGES[1])
  return {"sft": reference} | {
    s: merge_params(reference, load_policy(run, s)) for s in stages
  }


def get_start_stage(stage: str) -> str:
  """The stage whose policy a stage starts from, or asks: that of the round before.

  "claims_1" and "dpo_1" are of round 1, which starts from SFT; so is what has no
  rounds.
  """
  number = get_round(stage)
  return SFT_STAGES[1] if number == 1 else f"{DPO_STAGE}_{number - 1}"


def is_dpo_stage(stage: str) -> bool:
  """Whether a stage is DPO, of a round or not."""
  return split_round(stage)[0] == DPO_STAGE


def get_round(stage: str) -> int:
  """The number of a stage's round; 1 for a stage without one."""
  return split_round(stage)[1] or 1


def load_judges(run: Run) -> dict[str, Params]:
  """Whole variables of each of JUDGES that there is."""
  there = [
    name for name, stage in JUDGE_STAGES.items() if run.arrays.has(run.workdir / stage)
  ]
  return {name: load_judge(run, name) for name in there}


def load_judge(run: Run, name: str) -> Params:
  """Returns whole variables of one of JUDGES."""
  return load_policy_variables(run, JUDGE_STAGES[name])


def has_reward_model(run: Run) -> bool:
  return run.arrays.has(run.workdir / "rm")


def init_reward_model(run: Run) -> Params:
  """What the reward model trains, as it starts: the SFT policy's LoRA where both have
  the same base, and a head of small random weights.
  """
  key = jax.random.fold_in(jax.random.key(run.config.seed), 2)
  start = run.arrays.initialize(get_trainable_shapes(run.reward_model, run.mesh), key)
  if run.reward_model_base is run.base:
    start["lora"] = load_policy(run, SFT_STAGES[1])["lora"]
  return start


def load_reward_model_base(run: Run) -> Params:
  """The frozen part of reward model and critic; SFT's projector, if it is theirs."""
  if run.reward_model_base is not run.base:
    return run.reward_model_base
  projector = load_policy(run, SFT_STAGES[1])["params"]
  return merge_params(run.base, {"params": projector})


def load_reward_model(run: Run) -> Params:
  """Whole variables of the trained reward model."""
  like = {"reward": get_trainable_shapes(run.reward_model, run.mesh)}
  return merge_params(
    load_reward_model_base(run), run.arrays.restore(run.workdir / "rm", like)["reward"]
  )


def make_ppo_roles(run: Run, critic_head: str) -> tuple[Params, Params]:
  """(what is trained, what is frozen); the roles share the arrays of their base.

  Args:
    critic_head: one of CRITIC_HEADS; "reward" is the reward model's own.
  """
  params, frozen = make_policy_roles(run, SFT_STAGES[1])
  reward = load_reward_model(run)
  critic = {"lora": reward["lora"], "params": {"head": reward["params"]["head"]}}
  if critic_head == "zero":
    critic["params"] = run.arrays.zeros_like(critic["params"])
  roles = {"reward": reward, "critic": load_reward_model_base(run)}
  return params | {"critic": critic}, frozen | roles


def make_policy_roles(run: Run, start: str) -> tuple[Params, Params]:
  """(what is trained, what is frozen): the policy, and itself as the reference.

  Args:
    start: the stage that left the policy that both start as.
  """
  base = merge_params(run.base, {"params": load_policy(run, SFT_STAGES[1])["params"]})
  lora = {"lora": load_policy(run, start)["lora"]}
  return {"policy": lora}, {"policy": base, "ref": merge_params(base, lora)}
