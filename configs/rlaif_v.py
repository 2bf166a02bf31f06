"""RLAIF-V (2405.17220): claims judged one by one, DPO, again from where that led to.

python launch/run.py --config=configs/rlaif_v.py --workdir=runs/rlaif_v

Each of the `rounds` samples anew from the policy of the last, labels by divide and
conquer, trains by DPO, and takes its best checkpoint on held-out prompts.
"""

from ml_collections import ConfigDict

from configs import dpo, front
from vlmrlaif_jax.stages.labeling import claims

STAGES = ("sft_short", "sft_long", "round", "eval")
ROUNDS = 4


def tiny() -> ConfigDict:
  model, data = front.model_tiny(), front.data_tiny()
  config = front.recipe("rlaif_v", STAGES, model=model, data=data)
  config.rounds = ROUNDS  # Each has its claims and its DPO.
  config.sft = front.sft_tiny()
  config.claims = front.section(
    claims.default_config(),
    prompts=600,
    temperature=1.0,  # So small a model is so sure that at 0.7 its answers are alike.
    splitter="rules",
    split_prompt_len=160,
    split_max_new=96,
    check_len=320,
    check_rows=32,
  )
  config.dpo = dpo.dpo_tiny()
  config.dpo.select = "claims"
  config.label = front.label_tiny()  # How the judge of the evaluation is asked.
  config.evaluate = front.evaluate_tiny()
  return config


def llava_7b() -> ConfigDict:
  """Returns the setting of the paper: 10 samples of 4,000 prompts a round.

  A Llama-3-8B splits its claims, and another model than the policy checks them. Here
  the SFT policy and the model before SFT do so, or a server.
  """
  model, data = front.model_7b(), front.data_7b()
  config = front.recipe("rlaif_v", STAGES, model=model, data=data)
  config.rounds = ROUNDS
  config.sft = front.sft_7b()
  config.claims = front.section(
    claims.default_config(),
    prompts=4000,
    splitter="self",
    split_prompt_len=1536,
    split_max_new=512,
    check_len=1536,
    check_rows=8,
  )
  config.dpo = dpo.dpo_7b()
  config.dpo.select = "claims"
  config.label = front.label_7b()  # How the judge of the evaluation is asked.
  config.evaluate = front.evaluate_7b()
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  return front.choose({"tiny": tiny, "7b": llava_7b}, preset)
