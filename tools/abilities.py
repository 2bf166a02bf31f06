"""Measures a base model on the tasks of the pipeline, against the world's truth.

python tools/abilities.py --workdir=runs/abilities [--config.model.path=FOLDER]

The model answers, describes clips, and judges pairs of answers made from the hidden
truth. The judge reads nothing of the video, its own captions of the video's parts, or
the true ones. Writes abilities.json.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

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
from vlmrlaif_jax.runtime import answering, captioning, loading
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.labeling import pairwise

Row = dict[str, Any]  # An ability, of how many, and the share that is right.
JUDGED = 4  # Pairs that are judged about each video.


def default_config() -> ConfigDict:
  """Returns the model, the embedded world, and how captions and verdicts are asked."""
  model, data = front.model_tiny(), front.data_tiny()
  config = front.make_recipe("abilities", (), model=model, data=data)
  config.label = front.label_tiny()
  return config


def main(argv: list[str], config: ConfigDict, workdir: pathlib.Path) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  try:
    run_lib.check(config)
    pairwise.check(config)
    run = loading.create_run(config, workdir.absolute())
    with jax.set_mesh(run.mesh):
      rows = measure(run, run.workdir)
  except (UserError, ValueError) as error:
    sys.exit(f"error: {error}")
  print(f"\nWhat {config.model.path} can do\n")
  shown = [(row["ability"], row["of"], f"{row['right']:.1%}") for row in rows]
  print(markdown_table(shown, ("ability", "of", "right")))


def measure(run: Run, folder: pathlib.Path) -> list[Row]:
  """Returns the share of each ability that is right, and writes abilities.json.

  Raises:
    ValueError: the truth of the benchmark's scenes is not known.
  """
  examples = run.splits.benchmark
  if not all("scene" in (e.get("truth") or {}) for e in examples):
    raise ValueError(
      "abilities are measured on the embedded world, whose truth is known"
    )
  seen = {features.format_video_name(e["video"]): e for e in examples}
  videos = list(seen.values())
  rows = [
    *answers(run, run.base, examples),
    *captions(run, run.base, videos, folder / "captions.jsonl"),
    *judgements(run, run.base, videos, folder / "captions.jsonl"),
  ]
  write_json(folder / "abilities.json", rows)
  return rows


def answers(run: Run, variables: Params, examples: Sequence[Example]) -> list[Row]:
  """Short answers that are right, by kind of question."""
  short = [e for e in examples if e["truth"]["kind"] != truth.DESCRIPTION]
  texts = _ask(
    run,
    variables,
    [pairwise_judge.JudgeQuery(e["id"], e["video"], e["question"]) for e in short],
  )
  right: dict[str, list[bool]] = {}
  for example, said in zip(short, texts, strict=True):
    kind = example["truth"]["kind"]
    right.setdefault(kind, []).append(
      truth.count_answer_mistakes(example, said or "") == 0
    )
  return [_row(f"answer: {kind}", given) for kind, given in right.items()]


def captions(
  run: Run, variables: Params, videos: Sequence[Example], path: pathlib.Path
) -> list[Row]:
  """Statements of the captions of clips that are true, and captions wholly right."""
  _own(run, variables, videos, path, "all")
  names = {run.features.digest(e["video"]): e for e in videos}
  stretch = scene.SCENE_FRAMES // run.config.model.frames
  claims, whole = [], []
  for row in read_jsonl(path):
    shown = scene.scene_from_json(names[row["video"]]["truth"]["scene"])
    span = row["start"] * stretch, row["stop"] * stretch
    true = set(language.split_claims(language.describe_scene(shown, *span)))
    claims += [claim in true for claim in language.split_claims(row["caption"])]
    whole.append(language.count_mistakes(row["caption"], shown, *span) == 0)
  return [_row("caption: statements", claims), _row("caption: wholly right", whole)]


def judgements(
  run: Run, variables: Params, videos: Sequence[Example], path: pathlib.Path
) -> list[Row]:
  """Pairs of which both orders prefer the better answer, by what the judge is told."""
  rng = np.random.default_rng([run.config.seed, 17])
  pairs, better, about = [], [], []
  for example in videos:
    shown = scene.scene_from_json(example["truth"]["scene"])
    for i in range(JUDGED):
      question, a, wrong_a, b, wrong_b = mix.candidates(shown, rng)
      if wrong_a != wrong_b:
        pairs.append(
          pairwise_judge.AnswerPair(
            f"{example['id']}:{i}", example["video"], question, a, b
          )
        )
        better.append(1 if wrong_a < wrong_b else 2)
        about.append(example)
  told = {
    "nothing": [""] * len(pairs),
    "its own captions": _own(run, variables, about, path, "all"),
    "true captions": [_true(e) for e in about],
  }
  rows = []
  for name, narratives in told.items():
    asked = [p._replace(narrative=n) for p, n in zip(pairs, narratives, strict=True)]
    ask = lambda queries: _ask(run, variables, queries, judging=True)
    found = pairwise_judge.judge_pairs(asked, ask, run.prompts)
    preferred = [outcome.preference for outcome in found]
    right = [p == b for p, b in zip(preferred, better, strict=True)]
    kept = [r for r, p in zip(right, preferred, strict=True) if p is not None]
    rows += [
      _row(f"judge, told {name}: of all pairs", right),
      _row(f"judge, told {name}: of those kept", kept),
    ]
  return rows


def _own(run, variables, examples, path, which) -> list[str]:
  batch = run.config.label.batch
  return captioning.caption_videos(
    run, variables, examples, path, which=which, batch=batch
  )


def _true(example: Example) -> str:
  shown = scene.scene_from_json(example["truth"]["scene"])
  return " ".join(language.describe_scene(shown, *span) for span in mix.THIRDS)


def _ask(run, variables, queries, *, judging=False) -> list[str | None]:
  """The likeliest reply to each query."""
  data, config = run.config.data, run.config.label
  lengths = (data.prompt_len, data.response_len)
  if judging:
    lengths = (config.judge_prompt_len, config.judge_max_new)
  sampling = answering.SamplingSettings(*lengths, config.batch)
  return answering.Answerer(run, variables, sampling).ask_judge(queries)


def _row(ability: str, right: Sequence[bool]) -> Row:
  share = float(np.mean(right)) if len(right) else 0.0
  return {"ability": ability, "of": len(right), "right": share}


if __name__ == "__main__":
  # Not at import: tests import this module, and other programs define these flags, too.
  config_flag = config_flags.DEFINE_config_dict("config", default_config())
  workdir_flag = flags.DEFINE_string("workdir", None, "Of the world and the results.")
  flags.mark_flag_as_required("workdir")
  if not topologies.has_accelerator():
    jax.config.update("jax_platforms", "cpu")
  app.run(lambda argv: main(argv, config_flag.value, pathlib.Path(workdir_flag.value)))
