"""Parameters of each role: initial, trained, and merged with the frozen base.

The roles are policy, reference policy ("ref"), critic and reward model ("reward").
SFT trains LoRA and projector. Later stages add a LoRA of their own to the SFT policy,
whose own one stays, frozen.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from vlmrlaif_jax.core.stage_log import split_round
from vlmrlaif_jax.core.types import Params, merge_params
from vlmrlaif_jax.models.vlm import VLM
from vlmrlaif_jax.runtime.arrays import get_trainable_shapes
from vlmrlaif_jax.runtime.run import Run

SFT_STAGES = ("sft_short", "sft_long")  # The curriculum, in order.
DPO_STAGE = "dpo"  # With rounds, "dpo_1" starts from SFT and "dpo_2" from "dpo_1".
CRITIC_HEADS = ("zero", "reward")  # Initial critic heads: 0, or the reward model's.
# The stage that trains each judge. Every judge has the LoRA of a policy.
JUDGE_STAGES = {"sft": SFT_STAGES[1], "grm_sft": "grm_sft", "grm": "grm"}


def get_sft_model(run: Run) -> VLM:
  """Returns the policy's model with the LoRA of SFT."""
  rank, alpha = run.config.model.sft_lora_rank, run.config.model.sft_lora_alpha
  return run.policy.clone(llm=run.policy.llm.clone(rank=rank, alpha=alpha))


def init_policy(run: Run) -> Params:
  """Returns the initial SFT parameters: LoRA of product 0 and the base's projector."""
  return {"lora": _init_lora(run, get_sft_model(run), 1), "params": _get_projector(run)}


def _init_lora(run: Run, model: VLM, number: int) -> Params:
  key = jax.random.fold_in(jax.random.key(run.config.seed), number)
  return run.arrays.initialize(get_trainable_shapes(model, run.mesh), key)["lora"]


def _get_projector(run: Run) -> Params:
  """Returns the projector; none if the merger is a part of the vision tower."""
  params = run.base["params"]
  return {name: params[name] for name in ("projector",) if name in params}


def load_policy(run: Run, stage: str) -> Params:
  """Restores the policy parameters that a stage trained.

  Raises:
    UserError: the stage has no checkpoint in this workdir.
  """
  if stage in SFT_STAGES:
    lora = get_trainable_shapes(get_sft_model(run), run.mesh)
    like = {**lora, "params": _get_projector(run)}
  else:
    like = get_trainable_shapes(run.policy, run.mesh)
  return run.arrays.restore(run.workdir / stage, {"policy": like})["policy"]


def load_policy_variables(run: Run, stage: str) -> Params:
  """Returns the policy variables after a stage: base and trained parameters.

  The LoRA of SFT is in the collection "frozen_lora".
  """
  if stage not in SFT_STAGES:
    return merge_params(
      load_policy_variables(run, SFT_STAGES[1]), load_policy(run, stage)
    )
  trained = load_policy(run, stage)
  scale = run.config.model.sft_lora_alpha / run.config.model.sft_lora_rank
  frozen = run.arrays.map_leaves(
    lambda path, x: x * scale if path.endswith("/b") else x, trained["lora"]
  )
  added = {"frozen_lora": frozen, "params": trained["params"]}
  return merge_params(run.base, added)


def load_all_policies(run: Run, stages: Iterable[str]) -> dict[str, Params]:
  """Returns the variables of the SFT policy and of later policies, by stage name.

  Args:
    run: the run whose workdir has the checkpoints.
    stages: stages that train the SFT policy further; see stage.policy_stages.
  """
  reference = load_policy_variables(run, SFT_STAGES[1])
  return {"sft": reference} | {
    s: merge_params(reference, load_policy(run, s)) for s in stages
  }


def get_start_stage(stage: str) -> str:
  """Returns the stage whose policy a stage starts from or samples from.

  It is the previous round's DPO. Round 1 and stages without rounds start from SFT.

  >>> get_start_stage("claims_1"), get_start_stage("dpo_2")
  ('sft_long', 'dpo_1')
  """
  number = get_round(stage)
  return SFT_STAGES[1] if number == 1 else f"{DPO_STAGE}_{number - 1}"


def is_dpo_stage(stage: str) -> bool:
  """Returns whether a stage is DPO, with or without a round."""
  return split_round(stage)[0] == DPO_STAGE


def get_round(stage: str) -> int:
  """Returns the number of a stage's round, 1 for a stage without rounds."""
  return split_round(stage)[1] or 1


def load_judges(run: Run) -> dict[str, Params]:
  """Returns the variables of the judges that have a checkpoint, by name."""
  trained = [
    name for name, stage in JUDGE_STAGES.items() if run.arrays.has(run.workdir / stage)
  ]
  return {name: load_judge(run, name) for name in trained}


def load_judge(run: Run, name: str) -> Params:
  """Returns the variables of a judge, a key of JUDGE_STAGES."""
  return load_policy_variables(run, JUDGE_STAGES[name])


def has_reward_model(run: Run) -> bool:
  """Returns whether the workdir has a checkpoint of a reward model."""
  return run.arrays.has(run.workdir / "rm")


def init_reward_model(run: Run) -> Params:
  """Returns the initial parameters: LoRA of product 0, and a small random head."""
  key = jax.random.fold_in(jax.random.key(run.config.seed), 2)
  return run.arrays.initialize(get_trainable_shapes(run.reward_model, run.mesh), key)


def load_reward_model_base(run: Run) -> Params:
  """Returns the frozen variables of reward model and critic.

  They are those of the SFT policy if the base is the policy's.
  """
  if run.reward_model_base is not run.base:
    return run.reward_model_base
  return load_policy_variables(run, SFT_STAGES[1])


def load_reward_model(run: Run) -> Params:
  """Returns the variables of the trained reward model."""
  return merge_params(load_reward_model_base(run), _restore_reward_model(run))


def _restore_reward_model(run: Run) -> Params:
  like = {"reward": get_trainable_shapes(run.reward_model, run.mesh)}
  return run.arrays.restore(run.workdir / "rm", like)["reward"]


def make_ppo_roles(
  run: Run, critic_head: str, *, has_reward_model: bool
) -> tuple[Params, Params]:
  """Returns the trained and the frozen parameters of PPO, by role.

  Roles with the same base share its arrays.

  Args:
    run: the run whose workdir has SFT and, if it is used, the reward model.
    critic_head: one of CRITIC_HEADS.
    has_reward_model: whether the reward model scores. If not, the critic starts as an
      untrained reward model.
  """
  params, frozen = make_policy_roles(run, SFT_STAGES[1])
  base = run.reward_model_base
  base = frozen["policy"] if base is run.base else base
  trained = (_restore_reward_model if has_reward_model else init_reward_model)(run)
  critic = {"lora": trained["lora"], "params": {"head": trained["params"]["head"]}}
  if critic_head == "zero":
    critic["params"] = run.arrays.map_leaves(
      lambda path, x: jnp.zeros_like(x), critic["params"]
    )
  roles = {"critic": base}
  roles |= {"reward": merge_params(base, trained)} if has_reward_model else {}
  return params | {"critic": critic}, frozen | roles


def make_policy_roles(run: Run, start: str) -> tuple[Params, Params]:
  """Returns the trained and the frozen parameters of policy and reference, by role.

  Args:
    run: the run.
    start: the stage whose policy both roles start from. After SFT, the policy has a new
      LoRA of product 0. After another stage, it has that of the stage.
  """
  base = load_policy_variables(run, SFT_STAGES[1])
  if start in SFT_STAGES:
    lora = {"lora": _init_lora(run, run.policy, 3)}
    return {"policy": lora}, {"policy": base, "ref": base}
  lora = load_policy(run, start)
  return {"policy": lora}, {"policy": base, "ref": merge_params(base, lora)}
