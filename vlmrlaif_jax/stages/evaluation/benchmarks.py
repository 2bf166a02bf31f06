"""The stage `benchmarks`: benchmarks of papers, from their own files.

What stands in WORKDIR/benchmarks/NAME/POLICY:
  answers.jsonl     each answer, before any is judged; a killed run goes on from these
  by_letter.jsonl   the log-probability of each option of a multiple choice; by_text
  judgements.jsonl  each reply of the judge, by all that it depends on
  rows.jsonl        each case with its values, or why it has none
  scores.json       the scores, and all that moves them
and in WORKDIR/benchmarks/results.json all scores, the differences of two policies, and
each case with its values, to draw from again.
"""

import pathlib
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed, resumable
from vlmrlaif_jax.core.errors import (
  check_at_least,
  check_choices,
  subsection,
  user_errors,
)
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.evals import clip_similarity
from vlmrlaif_jax.evals.benchmarks import (
  action,
  amber,
  chair,
  mmhal,
  multiple_choice,
  protocol,
  refomb,
  retrieval,
  videochatgpt,
  world_files,
  zero_shot_qa,
)
from vlmrlaif_jax.evals.benchmarks.protocol import Judge, Model, Scores
from vlmrlaif_jax.evals.text_similarity import Likeness
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.runtime import answering, role_params
from vlmrlaif_jax.runtime import run as run_lib
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.evaluation import benchmark_policies as asked_of
from vlmrlaif_jax.stages.evaluation import benchmark_results as told_of
from vlmrlaif_jax.stages.evaluation.benchmark_policies import Shown
from vlmrlaif_jax.stages.stage import Rows, Stage

JUDGES = ("self", "endpoint", "exact")
LIKENESSES = ("clip", "statements")
# Told by what is in them.
FILES = ("questions", "videos", "synonyms", "annotations", "mapping")

POOLING = "means over patches, means over frames"  # Of models.projector.pool.


class Entry(NamedTuple):
  """A benchmark by its module."""

  module: ModuleType
  world: str | None = None  # Of the world's files what it reads; None: it has none.
  by: str = "judge"  # Or by "rules" of its own, or by the "likeness" of texts.


BENCHMARKS = {
  "videochatgpt": Entry(videochatgpt, "."),
  "zero_shot_qa": Entry(zero_shot_qa, "zero_shot_qa.json"),
  "msvd_qa": Entry(zero_shot_qa),
  "msrvtt_qa": Entry(zero_shot_qa),
  "activitynet_qa": Entry(zero_shot_qa),
  "multiple_choice": Entry(multiple_choice, "multiple_choice.json", "rules"),
  "videomme": Entry(multiple_choice, by="rules"),
  "retrieval": Entry(retrieval, "retrieval.json", "likeness"),
  "msvd_retrieval": Entry(retrieval, by="likeness"),
  "msrvtt_retrieval": Entry(retrieval, by="likeness"),
  "action": Entry(action, "action", "likeness"),
  "ucf101": Entry(action, by="likeness"),
  "hmdb51": Entry(action, by="likeness"),
  "chair": Entry(chair, "chair.json", "rules"),
  "amber": Entry(amber, "amber", "rules"),
  "mmhal": Entry(mmhal, "mmhal.json"),
  "refomb": Entry(refomb, "refomb.json"),
}


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      names=(),  # Of BENCHMARKS.
      # "self": the SFT policy, shown the video; "endpoint"; "exact": word for word,
      # where the embedded world's truth is known.
      judge="self",
      # Tokens of what the SFT policy is asked, video included.
      judge_prompt_len=placeholder(int),
      judge_max_new=placeholder(int),
      judge_sees=False,  # Whether an endpoint is shown frames; the papers' are not.
      # How alike texts are: by "clip", or by the embedded world's own "statements".
      likeness="clip",
      clip="",  # A CLIP folder in Hugging Face's form.
      clip_cut=77,  # Characters of what a policy says that CLIP reads; 0: all.
      prompt_len=0,  # Tokens of what a policy is asked, video included; 0: data's.
      batch=64,  # Questions, or cases to judge, at once.
      temperature=0.0,  # Of the answers.
      top_p=1.0,
      endpoint=endpoint.default_config(),
      # Files of each; "" where it can be made of the embedded world.
      **{name: entry.module.default_config() for name, entry in BENCHMARKS.items()},
    )
  )


def total_steps(run: Run) -> int:
  """Benchmarks."""
  return len(run.config.benchmarks.names)


def check(config: ConfigDict) -> None:
  """Refuses, before anything is computed, what could not be measured.

  Raises:
    UserError: a setting is wrong, a file is missing or not in the benchmark's layout.
  """
  section = config.benchmarks
  with user_errors("benchmarks"):
    check_choices(section, {"judge": JUDGES, "names": BENCHMARKS})
    check_choices(section, {"likeness": LIKENESSES})
    check_at_least(section, {"batch": 1, "temperature": 0, "prompt_len": 0})
    if not section.names:
      raise ValueError(f"names is empty: give some of {', '.join(BENCHMARKS)}")
    if section.judge == "endpoint":
      with subsection("endpoint"):
        endpoint.check(section.endpoint)
    for name, entry in BENCHMARKS.items():
      if entry.module is multiple_choice:
        with subsection(name):
          multiple_choice.check(section[name])
    _check_files(section)


def _check_files(section: ConfigDict) -> None:
  """Checks the files of each benchmark, and the settings that depend on them."""
  for name in section.names:
    entry, files = BENCHMARKS[name], section[name]
    if entry.by == "likeness":
      _check_likeness(section, name)
    if not files.questions and entry.world is None:
      raise ValueError(f"{name}.questions is not given; {entry.module.SOURCE.told()}")
    if files.questions:
      if section.judge == "exact" and entry.by == "judge":
        raise ValueError(
          'judge="exact" reads word for word, which is just to the embedded '
          f"world alone, and not to benchmarks.{name}: set it self or endpoint"
        )
      if not files.videos or not pathlib.Path(files.videos).is_dir():
        raise ValueError(
          f"{name}.videos={files.videos!r} is no folder; " + entry.module.SOURCE.told()
        )
      entry.module.load(files)


def _check_likeness(section: ConfigDict, name: str) -> None:
  """Refuses what no texts could be compared with."""
  if section.likeness == "clip":
    clip_similarity.check(section.clip)
  elif section[name].questions:
    raise ValueError(
      'likeness="statements" reads sentences of the embedded world alone, '
      f"and not those of benchmarks.{name}: set it clip, and benchmarks.clip"
    )


def run_stage(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Runs each benchmark with each policy.

  Returns:
    The means by "NAME.POLICY.MEASURE".
  """
  _write_world(run)
  config, policies = run.config.benchmarks, role_params.policies(run)
  shown = asked_of.Shown(run, log)
  judge = asked_of.judge_of(shown, policies["sft"], folder)
  compares = any(BENCHMARKS[name].by == "likeness" for name in config.names)
  alike = asked_of.likeness_of(config) if compares else None
  found = {}
  for number, name in enumerate(config.names):
    shown.done = number
    found[name] = measure(shown, name, policies, judge, alike, folder)
    log.table(f"{name}: mean [95 % interval]", told_of.table(found[name]))
    log.progress(number + 1, {})
  distributed.once(lambda: told_of.write_all(folder / "results.json", found))
  return {
    f"{name}.{policy}.{measure}": value.mean
    for name, policies in found.items()
    for policy, scores in policies.items()
    for measure, value in scores.values.items()
  }


def measure(
  shown: Shown,
  name: str,
  policies: dict[str, Params],
  judge: Judge,
  alike: Likeness | None,
  folder: pathlib.Path,
) -> dict[str, Scores]:
  """What a benchmark finds of each policy, which is written as well."""
  run, found = shown.run, {}
  files = files_of(run, name)
  batch = answering.BATCHES * run.config.benchmarks.batch
  for policy, variables in policies.items():
    shown.log.note(f"benchmarks: {name} with {policy}")
    at = folder / name / policy
    asked = asked_of.Policy(shown, variables, at)
    kept = protocol.kept(judge, at / "judgements.jsonl", batch)
    model = Model(asked.answer, asked.choose, alike)
    scores = BENCHMARKS[name].module.run(model, kept, files)
    shown.log.note(told_of.said_of(scores, asked.problems))
    by = {"judge": judge, "likeness": alike, "rules": None}[BENCHMARKS[name].by]
    told = told_of.result(scores, recipe_of(run, name, files, by), asked.problems)
    told = {"policy": policy, "weights": resumable.fingerprint(variables), **told}
    distributed.once(
      lambda at=at, told=told, rows=scores.rows: told_of.write(at, told, rows)
    )
    found[policy] = scores
  return found


def files_of(run: Run, name: str) -> ConfigDict:
  """The files of a benchmark; where none are given, those of the world."""
  given, world = run.config.benchmarks[name], BENCHMARKS[name].world
  if given.questions:
    return given
  videos = run_lib.videos_folder(run.config, run.workdir)
  made = given.copy_and_resolve_references()
  made.update(questions=str(_world(run) / world), videos=str(videos))
  return made


def _world(run: Run) -> pathlib.Path:
  return run.workdir / "benchmarks" / "world"


def _write_world(run: Run) -> None:
  """Writes the files of the world, for all benchmarks that none are given for."""
  section = run.config.benchmarks
  if not all(section[name].questions for name in section.names):
    videos = run_lib.videos_folder(run.config, run.workdir)
    given = run.splits.benchmark
    distributed.once(lambda: world_files.write(_world(run), given, videos))


def recipe_of(
  run: Run, name: str, files: ConfigDict, by: Judge | Likeness | None
) -> dict[str, Any]:
  """All that a score depends on beside the policy's weights: video scores move by
  several points with each of these.

  Args:
    by: who judged, or what compared texts; None: rules did.
  """
  config = run.config
  sampling = answering.sampling_of(config, "benchmarks")._asdict() | {
    "seed": config.seed
  }
  del sampling["batch"]  # No answer depends on it.
  return {
    "benchmark": name,
    "questions": protocol.content(files),
    "frames": config.model.frames,
    "resolution": run.policy.vision.image,
    "pooling": POOLING,
    "template": config.model.template,
    "sampling": sampling,
    "prompts": protocol.prompt_hash(BENCHMARKS[name].module.PROMPTS),
    "judge": {"name": "rules"} if by is None else {"name": by.name, **by.facts},
    "settings": {k: v for k, v in files.items() if k not in FILES},
  }


STAGES = (
  Stage(
    name="benchmarks",
    title="Benchmarks of papers",
    section="benchmarks",
    run=run_stage,
    total_steps=total_steps,
    check=check,
    batches=lambda config: {"benchmarks.batch": Rows(config.benchmarks.batch)},
    is_measurement=True,
  ),
)
