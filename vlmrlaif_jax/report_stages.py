"""The stages of a workdir as the report names them, in the order they stand there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmrlaif_jax.rounds import split_round

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
}


def stages_there(root: Path) -> list[str]:
  """The stages that a workdir has, rounds in their place: "claims_1", "dpo_1", ..."""
  found = [path.name for path in root.iterdir() if path.is_dir()]
  order = list(STAGES)
  numbered = [(*split_round(name), name) for name in found]
  known = [(kind, number, name) for kind, number, name in numbered if kind in STAGES]
  first = order.index("claims")  # All rounds stand here, one after another.
  place = lambda kind, number: (
    (first, number, order.index(kind)) if number else (order.index(kind), 0, 0)
  )
  return [name for kind, number, name in sorted(known, key=lambda k: place(*k[:2]))]


def title(name: str) -> str:
  kind, number = split_round(name)
  return f"{STAGES[kind]}, round {number}" if number else STAGES[kind]


def phases_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """What took how long in a stage: each phase with its seconds and its share.

  Args:
    rows: of metrics.jsonl. The first is left out if others have phases, too: it holds
      the compiling.
  """
  timed = [row["phases"] for row in rows if "phases" in row]
  seconds: dict[str, float] = {}
  for phases in timed[1:] or timed:
    for name, spent in phases.items():
      seconds[name] = seconds.get(name, 0.0) + spent
  total = sum(seconds.values()) or 1.0
  found = sorted(seconds.items(), key=lambda item: -item[1])
  return [
    {"name": name, "seconds": spent, "share": spent / total}
    for name, spent in found
    if spent / total >= 0.005
  ]
