"""Writes the model card of exported weights."""

import json
import pathlib
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.core.stage_log import split_round
from vlmrlaif_jax.evals.benchmarks.protocol import load_benchmarks
from vlmrlaif_jax.evals.summary import HELD_OUT
from vlmrlaif_jax.stages.evaluation import results
from vlmrlaif_jax.stages.stage import format_title, get_stage

TEMPLATE = pathlib.Path(__file__).parents[1] / "assets" / "model_card.md.j2"


def make_model_card(
  root: pathlib.Path,
  stage: str,
  kind: str,
  *,
  base_model: str | None = None,
) -> ModelCard:
  """Makes the card of a stage from the outputs of the stages up to it.

  The card has no license; the user adds it.

  Args:
    root: Workdir of the run.
    stage: Name of the exported stage.
    kind: "merged" or "adapter".
    base_model: Hub id of the base, for the metadata. None omits it.

  Raises:
    ValueError: `base_model` is not a Hub id.
  """
  if base_model is not None:
    validate_repo_id(base_model)
  config = read_json(root / "config.json")
  model, is_reward_model = config["model"], stage == "rm"
  stages = config["stages"]
  upstream = stages[: stages.index(stage) + 1] if stage in stages else [stage]
  rates = root / "label" / "rates.json"
  claims = [name for name in upstream if split_round(name)[0] == "claims"]
  has_label = "label" in upstream and rates.exists()
  data = ModelCardData(
    base_model=base_model,
    library_name="transformers" if kind == "merged" else "peft",
    pipeline_tag=None if is_reward_model else "video-text-to-text",
    tags=["jax", "rlaif"] if has_label or claims else ["jax"],
  )
  return ModelCard.from_template(
    data,
    template_path=str(TEMPLATE),
    name=root.name,
    stage=stage,
    kind=kind,
    title=format_title(stage),
    paper=get_stage(stage).paper,
    is_reward_model=is_reward_model,
    base=(is_reward_model and model["reward_model_path"]) or model["path"],
    model=model,
    data={
      "fine-tuning": config["data"]["records"],
      "prompts": config["data"]["prompts"],
      "benchmark": config["data"]["benchmark"],
    },
    summaries=_read_summaries(root, upstream),
    rates=read_json(rates) if has_label else None,
    judge=config["label"]["judge"] if has_label else None,
    claims=claims,
    oracle=config[stage]["oracle"]["kind"] if stage in ("grpo", "grm") else None,
    evaluation=_read_evaluation(root),
    config=json.dumps(config, indent=1),
  )


def _read_summaries(root: pathlib.Path, stages: list[str]) -> dict[str, str]:
  """Reads the summary of each finished stage as text."""
  paths = {stage: root / stage / "done.json" for stage in stages}
  summaries = {s: read_json(p)["summary"] for s, p in paths.items() if p.exists()}
  format_value = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
  return {
    stage: ", ".join(f"{key} {format_value(x)}" for key, x in summary.items())
    for stage, summary in summaries.items()
  }


def _read_evaluation(root: pathlib.Path) -> dict[str, Any] | None:
  """Reads the numbers of questions and videos and the results, as a Markdown table."""
  result = read_json(root / "eval" / "results.json", default={}).get(HELD_OUT)
  if result is None:
    return None
  rows = results.format_result(result, load_benchmarks()[HELD_OUT].shares)
  cells = [[cell.strip() for cell in row.values()] for row in rows]
  return {
    "questions": result["questions"],
    "videos": result["videos"],
    "table": markdown_table(cells, rows[0]),
  }
