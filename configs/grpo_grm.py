"""RL from a generative reward model that compares a group (2505.18531).

python launch/run.py --config=configs/grpo_grm.py --workdir=runs/grpo_grm

The judge of the stage "grm" scores every two responses to a prompt, in both orders; by
--config.grpo.oracle.grm_stage=grm_sft or sft, the judge that SFT taught or nobody.
"""

from ml_collections import ConfigDict

from configs import common, grm

STAGES = ("sft_short", "sft_long", "label", "grm_sft", "grm", "grpo", "eval")


def get_config(preset: str = "tiny") -> ConfigDict:
  config = common.recipe("grpo_grm", STAGES, preset)
  config.grpo.update(samples=5, rank_adv="grpo_scalar", truncated="keep")
  # The paper's 0.02 lets one seed in three of so small a policy run away.
  config.grpo.kl_coef = 0.02 if preset == "7b" else 0.1
  config.grpo.oracle.update(
    kind="grm", prompt_len=config.grm.prompt_len, max_new=config.grm.max_new
  )
  if preset == "7b":
    grm.paper(config)
    paper(config)
  return config


def paper(config: ConfigDict) -> None:
  """The setting of the paper's policy (its table 5), 30k prompts, 2 epochs.

  What is said of the judge in configs/grm.py holds here, too.
  """
  config.data.update(prompt_len=4096, response_len=512)
  config.grpo.update(
    batch_size=360,
    minibatches=3,
    microbatches=15,  # Of 8 prompts and all responses to them, on 8 devices at most.
    steps=167,
    temperature=1.0,
    clip_eps=0.2,
  )
  config.grpo.optimizer.update(
    learning_rate=3e-5, weight_decay=0.01, warmup_steps=15, schedule="cosine"
  )
  config.grpo.oracle.update(prompt_len=12800, max_new=2048)
