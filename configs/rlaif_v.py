"""RLAIF-V (2405.17220): rounds of claim-wise labels and DPO.

python launch/run.py --config=configs/rlaif_v.py --workdir=runs/rlaif_v

Each of the `rounds` samples from the policy of the previous round, judges the claims of
each response separately, trains by DPO, and selects the best checkpoint on held-out
prompts.
"""

from ml_collections import ConfigDict

from configs import dpo, front
from vlmrlaif_jax.stages.labeling import claims

STAGES = ("sft_short", "sft_long", "round", "eval")
ROUNDS = 4


def tiny() -> ConfigDict:
  """Returns the preset tiny, for the embedded world."""
  model, data = front.model_tiny(), front.data_tiny()
  config = front.make_recipe("rlaif_v", STAGES, model=model, data=data)
  config.rounds = ROUNDS
  config.sft = front.sft_tiny()
  config.claims = front.make_section(
    claims.default_config(),
    prompts=600,
    temperature=1.0,  # At 0.7, the answers of a model of this size barely differ.
    splitter="rules",
    split_prompt_len=160,
    split_max_new=96,
    check_len=320,
    check_rows=32,
  )
  config.dpo = dpo.dpo_tiny()
  config.dpo.select = "claims"
  config.label = front.label_tiny()  # The judge of the evaluation uses it.
  config.evaluate = front.evaluate_tiny()
  return config


def llava_7b() -> ConfigDict:
  """Returns the values of the paper: 10 samples of 4,000 prompts per round.

  In the paper, Llama-3-8B splits responses into claims, and a model other than the
  policy checks them. Here, the SFT policy splits and the base model checks, or a server
  does both.
  """
  model, data = front.model_7b(), front.data_7b()
  model.lora_dropout = 0.05
  config = front.make_recipe("rlaif_v", STAGES, model=model, data=data)
  config.rounds = ROUNDS
  config.sft = front.sft_7b()
  config.claims = front.make_section(
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
  config.label = front.label_7b()  # The judge of the evaluation uses it.
  config.evaluate = front.evaluate_7b()
  return config


def get_config(preset: str = "tiny") -> ConfigDict:
  """Returns the config of a preset."""
  return front.choose_preset({"tiny": tiny, "7b": llava_7b}, preset)
