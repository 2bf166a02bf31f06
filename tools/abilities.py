"""Measures a base model on the tasks of the pipeline, against the world's truth.

python tools/abilities.py --workdir=runs/abilities [--config.model.path=FOLDER]

The model answers questions, describes clips, and judges pairs of answers that are made
from the hidden truth. The judge's context is empty, the model's own captions of the
video's parts, or the true captions. The program writes abilities.json.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from configs import front
from tools.pretraining import mix
from vlmrlaif_jax.core.errors import UserError
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.jsonl import read_jsonl
from vlmrlaif_jax.core.markdown import markdown_table
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import features
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.data.world import language, scene
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.feedback import pairwise_judge
from vlmrlaif_jax.planner import topologies
from vlmrlaif_jax.recipes import workdir_lock
from vlmrlaif_jax.runtime import answering, captioning, loading
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.labeling import pairwise

# "ability", the count "of" answers or pairs, and the share "right" of them.
AbilityRow: TypeAlias = dict[str, Any]
PAIRS_PER_VIDEO = 4  # Pairs that the model judges about each video.


def default_config() -> ConfigDict:
  """Returns the settings of the model, the embedded world, captions and verdicts."""
  model, data = front.model_tiny(), front.data_tiny()
  config = front.make_recipe("abilities", (), model=model, data=data)
  config.label = front.label_tiny()
  return config


def main(argv: list[str], config: ConfigDict, workdir: pathlib.Path) -> None:
  """Measures the model of a config and prints a table."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  try:
    run_lib.check(config)
    pairwise.check(config)
    with workdir_lock.hold_workdir(workdir.absolute()):
      run = loading.create_run(config, workdir.absolute())
      with jax.set_mesh(run.mesh):
        rows = measure(run, run.workdir)
  except (UserError, ValueError) as error:
    sys.exit(f"error: {error}")
  print(f"\nAbilities of {config.model.path}\n")
  cells = [(row["ability"], row["of"], f"{row['right']:.1%}") for row in rows]
  print(markdown_table(cells, ("ability", "of", "right")))


def measure(run: Run, folder: pathlib.Path) -> list[AbilityRow]:
  """Returns the share of each ability that is right, and writes abilities.json.

  Raises:
    ValueError: The benchmark has an example without the truth of its scene.
  """
  examples = run.splits.benchmark
  if not all("scene" in (e.get("truth") or {}) for e in examples):
    raise ValueError(
      "abilities require examples of the embedded world, which have a ground truth: "
      "leave --config.data.records and --config.data.benchmark empty"
    )
  by_video = {features.format_video_name(e["video"]): e for e in examples}
  videos = list(by_video.values())
  rows = [
    *measure_answers(run, run.base, examples),
    *measure_captions(run, run.base, videos, folder / "captions.jsonl"),
    *measure_judgments(run, run.base, videos, folder / "captions.jsonl"),
  ]
  write_json(folder / "abilities.json", rows)
  return rows


def measure_answers(
  run: Run, variables: Params, examples: Sequence[Example]
) -> list[AbilityRow]:
  """Returns the share of right short answers for each kind of question."""
  short = [e for e in examples if e["truth"]["kind"] != truth.DESCRIPTION]
  texts = _generate_replies(
    run,
    variables,
    [pairwise_judge.JudgeQuery(e["id"], e["video"], e["question"]) for e in short],
  )
  right: dict[str, list[bool]] = {}
  for example, text in zip(short, texts, strict=True):
    kind = example["truth"]["kind"]
    right.setdefault(kind, []).append(
      truth.count_answer_mistakes(example, text or "") == 0
    )
  return [_make_row(f"answer: {kind}", answers) for kind, answers in right.items()]


def measure_captions(
  run: Run, variables: Params, videos: Sequence[Example], path: pathlib.Path
) -> list[AbilityRow]:
  """Returns the shares of true statements and of faultless captions of clips."""
  _caption_videos(run, variables, videos, path, "all")
  names = {run.features.digest(e["video"]): e for e in videos}
  claims, whole = [], []
  for row in read_jsonl(path):
    example = names[row["video"]]
    clip = scene.scene_from_json(example["truth"]["scene"])
    # Frames of the scene in a frame, or in a temporal patch, that the model reads.
    each = scene.SCENE_FRAMES // run.features.get_layout(example["video"]).grid.time
    span = row["start"] * each, row["stop"] * each
    true = set(language.split_claims(language.describe_scene(clip, *span)))
    claims += [claim in true for claim in language.split_claims(row["caption"])]
    whole.append(language.count_mistakes(row["caption"], clip, *span) == 0)
  return [
    _make_row("caption: statements", claims),
    _make_row("caption: wholly right", whole),
  ]


def measure_judgments(
  run: Run, variables: Params, videos: Sequence[Example], path: pathlib.Path
) -> list[AbilityRow]:
  """Returns the share of pairs whose better answer is preferred, for each context.

  A preference counts only if both orders of the pair give it.
  """
  rng = np.random.default_rng([run.config.seed, 17])
  pairs, better, about = [], [], []
  for example in videos:
    clip = scene.scene_from_json(example["truth"]["scene"])
    for i in range(PAIRS_PER_VIDEO):
      question, a, wrong_a, b, wrong_b = mix.make_candidates(clip, rng)
      if wrong_a != wrong_b:
        pairs.append(
          pairwise_judge.AnswerPair(
            f"{example['id']}:{i}", example["video"], question, a, b
          )
        )
        better.append(1 if wrong_a < wrong_b else 2)
        about.append(example)
  contexts = {
    "nothing": [""] * len(pairs),
    "its own captions": _caption_videos(run, variables, about, path, "all"),
    "true captions": [_make_true_captions(e) for e in about],
  }
  rows = []
  for name, narratives in contexts.items():
    queries = [p._replace(narrative=n) for p, n in zip(pairs, narratives, strict=True)]
    ask = lambda prompts: _generate_replies(run, variables, prompts, judging=True)
    outcomes = pairwise_judge.judge_pairs(queries, ask, run.prompts)
    preferred = [outcome.preference for outcome in outcomes]
    right = [p == b for p, b in zip(preferred, better, strict=True)]
    decided = [r for r, p in zip(right, preferred, strict=True) if p is not None]
    rows += [
      _make_row(f"judge, told {name}: of all pairs", right),
      _make_row(f"judge, told {name}: of those kept", decided),
    ]
  return rows


def _caption_videos(run, variables, examples, path, which) -> list[str]:
  batch = run.config.label.batch
  return captioning.caption_videos(
    run, variables, examples, path, which=which, batch=batch
  )


def _make_true_captions(example: Example) -> str:
  clip = scene.scene_from_json(example["truth"]["scene"])
  return " ".join(language.describe_scene(clip, *span) for span in mix.THIRDS)


def _generate_replies(run, variables, queries, *, judging=False) -> list[str | None]:
  """Returns the greedy reply to each query."""
  data, config = run.config.data, run.config.label
  lengths = (data.prompt_len, data.response_len)
  if judging:
    lengths = (config.judge_prompt_len, config.judge_max_new)
  sampling = answering.SamplingSettings(*lengths, config.batch)
  return answering.Answerer(run, variables, sampling).ask_judge(queries)


def _make_row(ability: str, right: Sequence[bool]) -> AbilityRow:
  share = float(np.mean(right)) if len(right) else 0.0
  return {"ability": ability, "of": len(right), "right": share}


if __name__ == "__main__":
  # Tests import this module, and other programs define flags of the same names.
  config_flag = config_flags.DEFINE_config_dict("config", default_config())
  workdir_flag = flags.DEFINE_string(
    "workdir", None, "Folder of the embedded world and of the results."
  )
  flags.mark_flag_as_required("workdir")
  if not topologies.has_accelerator():
    jax.config.update("jax_platforms", "cpu")
  app.run(lambda argv: main(argv, config_flag.value, pathlib.Path(workdir_flag.value)))
