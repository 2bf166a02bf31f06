"""Stages that come in rounds, by name: "dpo_2" is round 2 of "dpo"."""

import re


def split_round(name: str) -> tuple[str, int]:
  """("dpo", 2) of "dpo_2"; number 0 for a stage that has no rounds."""
  found = re.fullmatch(r"(.+)_(\d+)", name)
  return (found[1], int(found[2])) if found else (name, 0)


STAGES = {
  "pretrain_image": "Pretraining: to see single frames",
  "pretrain_see": "Pretraining: to see clips",
  "pretrain_judge": "Pretraining: to judge",
  "sft_short": "Supervised fine-tuning (SFT): short answers",
  "sft_long": "Supervised fine-tuning (SFT): long answers",
  "label": "Preference labels by the AI judge",
  "rm": "Reward model",
  "ppo": "PPO",
  "grm_sft": "A judge by SFT",
  "grm": "A judge by RL",
  "judges": "The judges against truth",
  "grpo": "GRPO",
  "claims": "Claims of the policy's answers, one by one",
  "dpo": "DPO",
  "eval": "Evaluation",
  "benchmarks": "Benchmarks of papers",
}


def title(name: str) -> str:
  kind, number = split_round(name)
  return f"{STAGES[kind]}, round {number}" if number else STAGES[kind]
