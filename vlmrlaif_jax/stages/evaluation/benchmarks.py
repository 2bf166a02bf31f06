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

import functools
import pathlib
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed, resumable
from vlmrlaif_jax.core.errors import (
  UserError,
  check_at_least,
  check_choices,
  subsection,
  user_errors,
)
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.evals import clip_similarity
from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  Benchmark,
  Judge,
  Model,
  Scores,
  all_benchmarks,
)
from vlmrlaif_jax.evals.text_similarity import Likeness
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.runtime import answering, video
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.stages.evaluation import benchmark_policies as asked_of
from vlmrlaif_jax.stages.evaluation import benchmark_results as told_of
from vlmrlaif_jax.stages.evaluation.benchmark_policies import Shown
from vlmrlaif_jax.stages.stage import Rows, Stage, policies_of

JUDGES = ("self", "endpoint", "exact")
LIKENESSES = ("clip", "statements")
POOLING = "means over patches, means over frames"  # Of models.projector.pool.


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      names=(),  # Of all_benchmarks.
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
      **{name: each.default_config() for name, each in all_benchmarks().items()},
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
    check_choices(section, {"judge": JUDGES, "names": all_benchmarks()})
    check_choices(section, {"likeness": LIKENESSES})
    check_at_least(section, {"batch": 1, "temperature": 0, "prompt_len": 0})
    if not section.names:
      raise ValueError(f"names is empty: give some of {', '.join(all_benchmarks())}")
    if section.judge == "endpoint":
      with subsection("endpoint"):
        endpoint.check(section.endpoint)
    for name, benchmark in all_benchmarks().items():
      with subsection(name):
        benchmark.check(section[name])
    for name in section.names:
      _check_files(section, all_benchmarks()[name])


def _check_files(section: ConfigDict, benchmark: Benchmark) -> None:
  """Checks the files of a benchmark, and the settings that depend on them."""
  name, source, files = benchmark.name, benchmark.source, section[benchmark.name]
  if benchmark.by == "likeness":
    _check_likeness(section, name)
  if not files.questions and benchmark.world is None:
    raise ValueError(f"{name}.questions is not given; {source.told()}")
  if files.questions:
    if section.judge == "exact" and benchmark.by == "judge":
      raise ValueError(
        'judge="exact" compares words, which is fair in the embedded world alone, and '
        f"not to benchmarks.{name}: set it self or endpoint"
      )
    if not files.videos or not pathlib.Path(files.videos).is_dir():
      raise ValueError(f"{name}.videos={files.videos!r} is no folder; {source.told()}")
    try:
      benchmark.load(files)
    except (FileNotFoundError, ValueError) as error:
      given = f"--config.benchmarks.{name}.questions={files.questions}"
      raise UserError(f"{given}: {error}") from error


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
  """Runs each benchmark with each policy of the workdir; see measure_policies."""
  policies = policies_of(run)
  return measure_policies(run, policies, folder, log)


def measure_policies(
  run: Run, policies: dict[str, Params], folder: pathlib.Path, log: Log
) -> dict[str, Any]:
  """Runs each benchmark with each policy.

  Args:
    run: models, data and settings.
    policies: variables of run.policy by name; "sft" judges if the judge is "self".
    folder: where the results are written.
    log: of total_steps(run).

  Returns:
    The means by "NAME.POLICY.MEASURE".
  """
  config = run.config.benchmarks
  shown = asked_of.Shown(run, log)
  judge = asked_of.judge_of(shown, policies["sft"], folder)
  benchmarks = [all_benchmarks()[name] for name in config.names]
  compares = any(benchmark.by == "likeness" for benchmark in benchmarks)
  alike = asked_of.likeness_of(config) if compares else None
  found = {}
  for number, benchmark in enumerate(benchmarks):
    name, shown.done = benchmark.name, number
    found[name] = measure(shown, benchmark, policies, judge, alike, folder)
    table = told_of.table(found[name], benchmark.shares)
    log.table(f"{name}: mean [95 % interval]", table)
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
  benchmark: Benchmark,
  policies: dict[str, Params],
  judge: Judge,
  alike: Likeness | None,
  folder: pathlib.Path,
) -> dict[str, Scores]:
  """What a benchmark finds of each policy, which is written as well."""
  run, found, name = shown.run, {}, benchmark.name
  files = files_of(run, benchmark)
  batch = answering.BATCHES * run.config.benchmarks.batch
  for policy, variables in policies.items():
    shown.log.note(f"benchmarks: {name} with {policy}")
    at = folder / name / policy
    asked = asked_of.Policy(shown, variables, at)
    kept = protocol.kept(judge, at / "judgements.jsonl", batch)
    model = Model(asked.answer, asked.choose, alike)
    scores = benchmark.run(model, kept, files)
    shown.log.note(told_of.said_of(scores, asked.problems))
    by = {"judge": judge, "likeness": alike, "rules": None}[benchmark.by]
    told = told_of.result(scores, recipe_of(run, benchmark, files, by), asked.problems)
    told = {"policy": policy, "weights": resumable.fingerprint(variables), **told}
    distributed.once(functools.partial(told_of.write, at, told, scores.rows))
    found[policy] = scores
  return found


def files_of(run: Run, benchmark: Benchmark) -> ConfigDict:
  """Returns a benchmark's settings; writes its files of the world if it has none.

  Raises:
    UserError: no files are given, and the data are not of the embedded world.
  """
  given, write = run.config.benchmarks[benchmark.name], benchmark.world
  if given.questions or write is None:
    return given
  world_files.check(run.splits.benchmark)
  folder = run.workdir / "benchmarks" / "world"
  videos = str(video.videos_folder(run))
  questions = distributed.once(lambda: str(write(folder, run.splits.benchmark, videos)))
  files = given.copy_and_resolve_references()
  files.update(questions=questions, videos=videos)
  return files


def recipe_of(
  run: Run, benchmark: Benchmark, files: ConfigDict, by: Judge | Likeness | None
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
  named = (*benchmark.files, "videos")  # The hash of the files says more.
  return {
    "benchmark": benchmark.name,
    "questions": protocol.content(benchmark, files),
    "frames": config.model.frames,
    "resolution": run.policy.vision.image,
    "pooling": POOLING,
    "template": config.model.template,
    "sampling": sampling,
    "prompts": protocol.prompt_hash(benchmark.prompts),
    "judge": {"name": "rules"} if by is None else {"name": by.name, **by.facts},
    "settings": {k: v for k, v in files.items() if k not in named},
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
