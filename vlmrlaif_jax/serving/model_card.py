"""The model card that stands beside exported weights."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.stages.evaluation import evaluate

_TRAINED = {
  "sft_short": "supervised fine-tuning on short answers",
  "sft_long": "supervised fine-tuning on short, then long answers",
  "rm": "a reward model on preferences that a model judged",
  "ppo": "supervised fine-tuning, then PPO against a reward model of AI feedback",
}
_VIDEO = """```python
import torch

# pixels: [frames, 3, side, side], as the processor makes them; ids: [1, time], with the
# id of <image> repeated frames + patches times where the video goes.
tower, mlp = model.model.vision_tower, model.model.multi_modal_projector
hidden = tower(pixels, output_hidden_states=True).hidden_states
patches = mlp(hidden[model.config.vision_feature_layer][:, 1:])
video = torch.cat([patches.mean(1), patches.mean(0)])  # Frames first, then places.
embeds = model.get_input_embeddings()(ids)
embeds[ids == model.config.image_token_id] = video
model.generate(inputs_embeds=embeds, max_new_tokens=256)
```"""


def write(root: pathlib.Path, stage: str, kind: str) -> str:
  """The card of a stage of a workdir, in Markdown.

  Args:
    root: the workdir; what its stages wrote is told of, as far as they were run.
    kind: what was exported: "merged" or "adapter".
  """
  config = read_json(root / "config.json")
  parts = {
    "Method": _method(config, stage, kind),
    "Data": _data(root, config),
    "Judge": _judge(root),
    "Evaluation": _evaluation(root),
    "Videos in transformers": _VIDEO if kind == "merged" else "",
    "Limits": _limits(config),
    "Config": f"```json\n{json.dumps(config, indent=1)}\n```",
  }
  head = "---\npipeline_tag: video-text-to-text\ntags: [jax, rlaif]\n---\n"
  body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items() if text)
  return f"{head}# {root.name}: {stage}\n\n{body}\n"


def _method(config: Mapping[str, Any], stage: str, kind: str) -> str:
  model = config["model"]
  form = {
    "merged": "The LoRA updates are in the weights.",
    "adapter": "This is a PEFT adapter: LoRA factors, and the projector whole.",
  }
  return (
    f"A video-language model after {_TRAINED.get(stage, stage)}, following VLM-RLAIF "
    f"(2402.03746). Base: `{model['path']}`. LoRA of rank {model['lora_rank']}, alpha "
    f"{model['lora_alpha']}, on every matrix of the language model; the vision tower "
    f"is frozen. {form[kind]}\n\nPrompts are written by the template "
    f"`{model['template']}`; {model['frames']} evenly spaced frames of a video are "
    "encoded, projected, and pooled to one token a frame and one a place."
  )


def _data(root: pathlib.Path, config: Mapping[str, Any]) -> str:
  data = config["data"]
  names = {"records": "fine-tuning", "prompts": "prompts", "benchmark": "benchmark"}
  lines = [
    f"- {what}: " + (f"`{data[key]}`" if data[key] else "the embedded world, rendered")
    for key, what in names.items()
  ]
  for stage in _TRAINED:
    path = root / stage / "done.json"
    if path.exists():
      told = read_json(path)["summary"]
      said = ", ".join(f"{key} {_said(value)}" for key, value in told.items())
      lines.append(f"- `{stage}`: {said}")
  return "\n".join(lines)


def _judge(root: pathlib.Path) -> str:
  path = root / "label" / "rates.json"
  if not path.exists():
    return "Preferences were given, or none were needed; no judge was run here."
  rates = read_json(path)
  text = (
    "The fine-tuned model itself compared two of its answers, in both orders; pairs on "
    f"which the orders agreed were kept: {rates['kept']} of {rates['asked']}."
  )
  if rates.get("truth_pairs"):
    text += (
      f" {rates['truth_agreement']:.1%} of the {rates['truth_pairs']} of which truth "
      "is known are as truth has it."
    )
  return text


def _evaluation(root: pathlib.Path) -> str:
  path = root / "eval" / "results.json"
  if not path.exists():
    return "Not evaluated: the run has no `eval` stage yet."
  results = read_json(path)
  rows = evaluate.table(results)
  columns = list(rows[0])
  line = lambda cells: "| " + " | ".join(cells) + " |"
  table = [line(columns), line("---" for _ in columns)]
  table += [line(row[column].strip() for column in columns) for row in rows]
  return (
    f"{results['questions']} held-out questions about {results['videos']} videos; "
    "means with 95 % bootstrap intervals over videos.\n\n" + "\n".join(table)
  )


def _limits(config: Mapping[str, Any]) -> str:
  world = (
    ""
    if config["data"]["records"]
    else ("It was trained on rendered clips of moving objects and knows nothing else. ")
  )
  return (
    f"{world}Feedback came from a model, whose errors and preferences it has learned: "
    "what the judge cannot see, training does not mend, and may hide. Answers are not "
    "checked; do not rely on them where a mistake matters."
  )


def _said(value: Any) -> str:
  return f"{value:.3g}" if isinstance(value, float) else str(value)
