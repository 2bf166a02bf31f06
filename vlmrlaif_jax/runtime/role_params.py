"""The weights of each role: as a stage starts with them, and as it leaves them."""

from collections.abc import Iterable

import jax

from vlmrlaif_jax.core.stage_log import split_round
from vlmrlaif_jax.core.types import Params, join
from vlmrlaif_jax.runtime.arrays import trainable_shapes
from vlmrlaif_jax.runtime.run import Run

SFT = ("sft_short", "sft_long")  # The curriculum, in order.
DPO = "dpo"  # In rounds, "dpo_1" starts from SFT and "dpo_2" from "dpo_1".
CRITIC_HEADS = ("zero", "reward")  # What a critic's head starts as.
# Judges by name: the stage that made each. All have the LoRA of a policy.
JUDGES = {"sft": SFT[1], "grm_sft": "grm_sft", "grm": "grm"}


def initial_policy(run: Run) -> Params:
  """What SFT trains, as it starts: LoRA that changes nothing, the base's projector."""
  key = jax.random.fold_in(jax.random.key(run.config.seed), 1)
  lora = run.arrays.initialize(trainable_shapes(run.policy, run.mesh), key)["lora"]
  return {"lora": lora, "params": _projector(run)}


def _projector(run: Run) -> Params:
  return {"projector": run.base["params"]["projector"]}


def policy_of(run: Run, stage: str) -> Params:
  """The trained part of the policy, as a stage left it.

  Raises:
    UserError: the stage has not been run in this workdir.
  """
  lora = trainable_shapes(run.policy, run.mesh)
  like = {"policy": {**lora, "params": _projector(run)}}
  if stage not in SFT:
    like = {"policy": lora}
  return run.arrays.restore(run.workdir / stage, like)["policy"]


def policy_variables(run: Run, stage: str) -> Params:
  """Returns whole variables of the policy as a stage left it."""
  if stage in SFT:
    return join(run.base, policy_of(run, stage))
  # RL leaves the projector as SFT made it.
  return join(policy_variables(run, SFT[1]), policy_of(run, stage))


def policies(run: Run, stages: Iterable[str]) -> dict[str, Params]:
  """Returns whole variables of the SFT policy and of the policies that stages left.

  Args:
    run: the run whose workdir has them.
    stages: names of stages that train SFT's policy further; see stage.policy_stages.
  """
  reference = policy_variables(run, SFT[1])
  return {"sft": reference} | {s: join(reference, policy_of(run, s)) for s in stages}


def start_of(stage: str) -> str:
  """The stage whose policy a stage starts from, or asks: that of the round before.

  "claims_1" and "dpo_1" are of round 1, which starts from SFT; so is what has no
  rounds.
  """
  number = round_of(stage)
  return SFT[1] if number == 1 else f"{DPO}_{number - 1}"


def is_dpo(stage: str) -> bool:
  """Whether a stage is DPO, of a round or not."""
  return split_round(stage)[0] == DPO


def round_of(stage: str) -> int:
  """The number of a stage's round; 1 for a stage without one."""
  return split_round(stage)[1] or 1


def judges(run: Run) -> dict[str, Params]:
  """Whole variables of each of JUDGES that there is."""
  there = [
    name for name, stage in JUDGES.items() if run.arrays.has(run.workdir / stage)
  ]
  return {name: judge_variables(run, name) for name in there}


def judge_variables(run: Run, name: str) -> Params:
  """Returns whole variables of one of JUDGES."""
  return policy_variables(run, JUDGES[name])


def has_reward_model(run: Run) -> bool:
  return run.arrays.has(run.workdir / "rm")


def initial_scorer(run: Run) -> Params:
  """What the reward model trains, as it starts: the SFT policy's LoRA where both have
  the same base, and a head of small random weights.
  """
  key = jax.random.fold_in(jax.random.key(run.config.seed), 2)
  start = run.arrays.initialize(trainable_shapes(run.scorer, run.mesh), key)
  if run.scorer_base is run.base:
    start["lora"] = policy_of(run, SFT[1])["lora"]
  return start


def scorer_base(run: Run) -> Params:
  """The frozen part of reward model and critic; SFT's projector, if it is theirs."""
  if run.scorer_base is not run.base:
    return run.scorer_base
  projector = policy_of(run, SFT[1])["params"]
  return join(run.base, {"params": projector})


def reward_variables(run: Run) -> Params:
  """Whole variables of the trained reward model."""
  like = {"reward": trainable_shapes(run.scorer, run.mesh)}
  return join(scorer_base(run), run.arrays.restore(run.workdir / "rm", like)["reward"])


def ppo_roles(run: Run, critic_head: str) -> tuple[Params, Params]:
  """(what is trained, what is frozen); the roles share the arrays of their base.

  Args:
    critic_head: one of CRITIC_HEADS; "reward" is the reward model's own.
  """
  params, frozen = policy_roles(run, SFT[1])
  reward = reward_variables(run)
  critic = {"lora": reward["lora"], "params": {"head": reward["params"]["head"]}}
  if critic_head == "zero":
    critic["params"] = run.arrays.zeros_like(critic["params"])
  roles = {"reward": reward, "critic": scorer_base(run)}
  return params | {"critic": critic}, frozen | roles


def policy_roles(run: Run, start: str) -> tuple[Params, Params]:
  """(what is trained, what is frozen): the policy, and itself as the reference.

  Args:
    start: the stage that left the policy that both start as.
  """
  base = join(run.base, {"params": policy_of(run, SFT[1])["params"]})
  lora = {"lora": policy_of(run, start)["lora"]}
  return {"policy": lora}, {"policy": base, "ref": join(base, lora)}
