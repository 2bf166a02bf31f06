"""The stage `eval`: benchmarks of every policy in the workdir.

It writes to WORKDIR/eval:
  results.json     scores of each benchmark, and the difference of two policies
  answers.jsonl    the answers of all policies to held-out questions, side by side
  endpoint.jsonl   the replies of a server that judges
  world/           benchmark files of the embedded world, if the config gives none
  held_out/judge_POLICY.jsonl    verdicts of the first policy as the judge of pairs
  held_out/best_of_POLICY.jsonl  answers and their rewards, for the best of n
  NAME/POLICY/     for each benchmark and policy:
    answers.jsonl     answers before judging; a killed run resumes from these
    by_letter.jsonl   log-probability of each option of a multiple choice; by_text
    judgements.jsonl  replies of the judge, by all that they depend on
    rows.jsonl        each case with its values, or why it has none
    scores.json       the scores, and the settings that they depend on
"""

import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed, jsonl, resumable
from vlmrlaif_jax.core.errors import (
  UserError,
  check_at_least,
  check_choices,
  subsection,
  user_errors,
)
from vlmrlaif_jax.core.files import read_json, write_json
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data.records import SkippedRecord, format_skipped_records
from vlmrlaif_jax.evals import clip_similarity, judging
from vlmrlaif_jax.evals.benchmarks import protocol, world_files
from vlmrlaif_jax.evals.benchmarks.protocol import (
  Benchmark,
  CaseJudge,
  load_benchmarks,
)
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.evals.summary import HELD_OUT, select_comparable
from vlmrlaif_jax.evals.text_similarity import STATEMENTS, Similarity
from vlmrlaif_jax.feedback import endpoint
from vlmrlaif_jax.runtime import answering, rewarding, role_params, video, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.evaluation import results
from vlmrlaif_jax.stages.evaluation.policies import (
  EncodedRun,
  make_benchmark_policies,
  make_judge,
  make_pair_judge,
)
from vlmrlaif_jax.stages.stage import Stage, load_workdir_policies

EVALUATION_JUDGES = ("self", "endpoint", "exact")
SIMILARITIES = ("clip", "statements")
POOLING = "means over patches, means over frames"  # See models.projector.pool.


def default_config() -> ConfigDict:
  """Returns the settings of the section `evaluate`."""
  return ConfigDict(
    dict(
      names=(HELD_OUT,),  # Keys of load_benchmarks().
      batch=64,  # Questions or cases per batch.
      temperature=0.0,  # Sampling temperature of the answers; 0 is greedy.
      top_p=1.0,
      prompt_len=0,  # Tokens of a policy's prompt, video included; 0: data.prompt_len.
      resamples=2000,  # Bootstrap resamples.
      # "self": the SFT policy with the video; "endpoint": a server; "exact": comparison
      # of words, for the embedded world only.
      judge="self",
      # Tokens of the prompt of the judge "self", video included, and of its reply.
      judge_prompt_len=2048,
      judge_max_new=64,
      # Whether a server receives frames; in the papers, it does not.
      judge_sees_video=False,
      # Similarity of texts: "clip", or "statements" of the embedded world.
      similarity="clip",
      clip="",  # Folder of a CLIP checkpoint in Hugging Face format.
      clip_cut=77,  # Maximum characters of a response for CLIP; 0: all.
      endpoint=endpoint.default_config(),
      # Settings of each benchmark. A file "" is written from the embedded world, if
      # possible.
      **{name: each.default_config() for name, each in load_benchmarks().items()},
    )
  )


# Checks before the first stage starts.


def check(config: ConfigDict) -> None:
  """Checks the section `evaluate` and the files of its benchmarks.

  Raises:
    UserError: A setting is invalid, or a file is missing or has another layout.
  """
  section = config.evaluate
  with user_errors("evaluate"):
    choices = dict(
      judge=EVALUATION_JUDGES, names=load_benchmarks(), similarity=SIMILARITIES
    )
    check_choices(section, choices)
    minima = dict(temperature=0, prompt_len=0, resamples=1, clip_cut=0)
    check_at_least(section, minima | dict(judge_prompt_len=1, judge_max_new=1))
    if not section.names:
      raise ValueError(f"names is empty: give some of {', '.join(load_benchmarks())}")
    if section.judge == "endpoint":
      with subsection("endpoint"):
        endpoint.check(section.endpoint)
    for name, benchmark in load_benchmarks().items():
      with subsection(name):
        benchmark.check(section[name])
    for name in section.names:
      if load_benchmarks()[name].load:
        _check_files(section, load_benchmarks()[name])


def _check_files(section: ConfigDict, benchmark: Benchmark) -> None:
  """Checks the files of a benchmark, and the settings that depend on them."""
  name, source, files = benchmark.name, benchmark.source, section[benchmark.name]
  if benchmark.scoring == "similarity" and section.similarity == "clip":
    clip_similarity.check_clip_folder(section.clip)
  if not files.questions and benchmark.world is None:
    raise ValueError(f"{name}.questions is empty; {source.describe()}")
  if files.questions:
    if section.similarity == "statements" and benchmark.scoring == "similarity":
      raise ValueError(
        'similarity="statements" parses sentences of the embedded world only, not of '
        f"{name}: set --config.evaluate.similarity=clip and --config.evaluate.clip"
      )
    if section.judge == "exact" and benchmark.scoring == "judge":
      raise ValueError(
        'judge="exact" compares words, which suits the embedded world only, not '
        f"{name}: set --config.evaluate.judge=self or endpoint"
      )
    if not files.videos or not pathlib.Path(files.videos).is_dir():
      raise ValueError(
        f"{name}.videos={files.videos!r} is no folder; {source.describe()}"
      )
    try:
      if benchmark.load:
        benchmark.load(files, [])
    except (FileNotFoundError, ValueError) as error:
      flag = f"--config.evaluate.{name}.questions={files.questions}"
      raise UserError(f"{flag}: {error}") from error


def list_read_sections(config: ConfigDict) -> tuple[str, ...]:
  """Returns the other sections that the evaluation reads.

  Raises:
    UserError: `evaluate.held_out.best_of` is invalid, which would otherwise be reported
      as a missing section.
  """
  section = config.evaluate
  if HELD_OUT not in section.names:
    return ()
  with user_errors(f"evaluate.{HELD_OUT}"):
    load_benchmarks()[HELD_OUT].check(section.held_out)
  return ("label",) if section.held_out.judge else ()  # Settings of the judge.


# Measurement.


def run_evaluation(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Measures each policy of the workdir with each benchmark; see measure_policies."""
  reward = rewarding.make_text_scorer(run)
  return measure_policies(run, load_workdir_policies(run), reward, folder, log)


def workload(run: Run, stage: str) -> Workload:
  """Returns the workload of answering the held-out questions."""
  config, data = run.config.evaluate, run.config.data
  policy = role_params.load_judge(run, "sft")
  sampling = answering.read_sampling_settings(run.config, "evaluate")
  tokens = config.batch * (data.prompt_len + data.response_len)
  functions = [
    workloads.make_encode_function(run, config.batch),
    workloads.make_answer_function(run, policy, "answers", sampling, runs=1.0),
  ]
  return Workload(functions, 0, config.batch, tokens)


def measure_policies(
  run: Run,
  policies: dict[str, Params],
  reward: rewarding.TextScorer | None,
  folder: pathlib.Path,
  log: StageLog,
) -> dict[str, Any]:
  """Measures each policy with each benchmark, and writes the results.

  Args:
    run: The run.
    policies: Variables of run.policy by name; "sft" is the judge "self".
    reward: Scores answers by the section `reward`; None for no scores.
    folder: Folder of the results.
    log: Log of the stage, with a step for each benchmark.

  Returns:
    The means by "NAME.POLICY.MEASURE".

  Raises:
    UserError: No question of a benchmark was answered. The others are measured.
  """
  config = run.config.evaluate
  encoded = EncodedRun(run, log, reward)
  judge = make_judge(encoded, policies["sft"], folder)
  benchmarks = [load_benchmarks()[name] for name in config.names]
  similarity = STATEMENTS
  if config.similarity == "clip" and any(
    each.scoring == "similarity" for each in benchmarks
  ):
    similarity = clip_similarity.make_clip_similarity(config.clip, cut=config.clip_cut)
  path = folder / "results.json"
  # Results of other benchmarks by an earlier run stay.
  measured = distributed.on_process_zero(lambda: read_json(path, default={}))
  unanswered: list[str] = []
  for number, benchmark in enumerate(benchmarks):
    name, encoded.done = benchmark.name, number
    measured[name], reason = measure_benchmark(
      encoded, benchmark, policies, judge, similarity, folder
    )
    unanswered += [reason] if reason else []
    distributed.on_process_zero(lambda: write_json(path, measured))
    table = results.format_result(measured[name], benchmark.shares)
    log.print_table(f"{name}: mean [95 % interval]", table)
    log.log_progress(number + 1, {})
  if unanswered:
    raise UserError("\n".join(unanswered))
  return {
    f"{name}.{policy}.{measure}": value["mean"]
    for name in config.names
    for policy, scores in measured[name]["policies"].items()
    for measure, value in scores.items()
  }


def measure_benchmark(
  encoded: EncodedRun,
  benchmark: Benchmark,
  policies: dict[str, Params],
  judge: CaseJudge,
  similarity: Similarity,
  folder: pathlib.Path,
) -> tuple[dict[str, Any], str]:
  """Measures each policy with a benchmark, and writes the scores.

  Returns:
    The entry of results.json, see results.make_benchmark_result, and the reason if no
    question was answered, see results.explain_no_answers.
  """
  run, name, config = encoded.run, benchmark.name, encoded.run.config.evaluate
  files = prepare_files(run, benchmark, folder)
  items, skipped = _load_items(encoded, benchmark, files)
  counts = files.best_of if name == HELD_OUT else ()
  answering_policies = make_benchmark_policies(encoded, policies, folder / name, counts)
  rows = {}
  for policy, each in answering_policies.items():
    encoded.log.print_note(f"eval: {name} with {policy}")
    batch = answering.BATCHES * config.batch
    cached_judge = judging.cache_judge(judge, each.folder / "judgements.jsonl", batch)
    rows[policy] = benchmark.run(
      items, each.make_model(similarity), cached_judge, files
    )
  before, after = select_comparable(rows)
  if benchmark.compare and files.judge and before != after:
    encoded.log.print_note(f"eval: {before} judges its answers and those of {after}")
    file = folder / name / f"judge_{before}.jsonl"
    pair_judge = make_pair_judge(encoded, policies[before], file)
    pair = rows[before], rows[after]
    rows[before], rows[after] = benchmark.compare(items, pair, pair_judge)
  resampling = Resampling(seed=run.config.seed, resamples=config.resamples)
  scores = {
    policy: protocol.average_scores(each, resampling) for policy, each in rows.items()
  }
  by = {"judge": judge, "similarity": similarity, "rules": None}[benchmark.scoring]
  recipe = describe_recipe(run, benchmark, files, items, by)
  for policy, each in answering_policies.items():
    encoded.log.print_note(results.summarize_coverage(scores[policy], each.problems))
    weights = resumable.compute_fingerprint(each.variables)
    identity = {"policy": policy, "weights": weights}
    arguments = (identity, scores[policy], recipe, [*skipped, *each.problems])
    distributed.on_process_zero(
      functools.partial(results.write_policy_result, each.folder, *arguments)
    )
  if name == HELD_OUT:
    answers = results.merge_policy_rows(run, rows)
    distributed.on_process_zero(
      lambda: jsonl.write_records(folder / "answers.jsonl", answers)
    )
  result = results.make_benchmark_result(scores, resampling)
  problems = [p for each in answering_policies.values() for p in each.problems]
  return result, results.explain_no_answers(name, scores, problems)


def _load_items(
  encoded: EncodedRun, benchmark: Benchmark, files: ConfigDict
) -> tuple[Any, list[SkippedRecord]]:
  """Returns the items of a benchmark and the skipped records, which are logged."""
  skipped: list[SkippedRecord] = []
  if not benchmark.load:
    return encoded.run.splits.benchmark, skipped
  items = benchmark.load(files, skipped)
  if skipped:
    lines = format_skipped_records(skipped, total=len(items) + len(skipped))
    encoded.log.print_note(f"eval: {benchmark.name}: {lines}")
  return items, skipped


# Files and recipes.


def prepare_files(run: Run, benchmark: Benchmark, folder: pathlib.Path) -> ConfigDict:
  """Returns a benchmark's settings, and writes files of the embedded world if needed.

  Raises:
    UserError: The config names no files, and the data are not of the embedded world.
  """
  settings, write_files = run.config.evaluate[benchmark.name], benchmark.world
  if write_files is None or settings.questions:
    return settings
  world_files.check_world_examples(run.splits.benchmark)
  videos = str(video.get_videos_folder(run))
  questions = distributed.on_process_zero(
    lambda: str(write_files(folder / "world", run.splits.benchmark, videos))
  )
  files = settings.copy_and_resolve_references()
  files.update(questions=questions, videos=videos)
  return files


def describe_recipe(
  run: Run,
  benchmark: Benchmark,
  files: ConfigDict,
  items: Sequence,
  by: CaseJudge | Similarity | None,
) -> dict[str, Any]:
  """Returns everything that a score depends on except the weights of models.

  Scores of video models change by several points with each entry. The judge of pairs
  and the reward model are not included. `by` is the judge or the similarity of texts,
  None for rules.
  """
  config = run.config
  sampling = answering.read_sampling_settings(config, "evaluate")._asdict()
  del sampling["batch"]  # Answers do not depend on it.
  paths = (*benchmark.files, "videos")  # A hash of the files replaces them.
  questions = [(item["id"], item["question"]) for item in items if not benchmark.load]
  return {
    "benchmark": benchmark.name,
    "questions": protocol.hash_benchmark_files(benchmark, files)
    if benchmark.load
    else hashlib.sha256(repr(questions).encode()).hexdigest()[:16],
    "frames": config.model.frames,
    "resolution": run.processor.resolution,
    "pooling": "none" if run.processor.layout is None else POOLING,
    "template": config.model.template,
    "sampling": sampling | {"seed": config.seed},
    "prompts": protocol.hash_prompts(benchmark.prompts),
    "judge": {"name": "rules"} if by is None else {"name": by.name, **by.facts},
    "settings": {k: v for k, v in files.items() if k not in paths},
  }


STAGES = (
  Stage(
    name="eval",
    title="Evaluation",
    section="evaluate",
    run=run_evaluation,
    total_steps=lambda run: len(run.config.evaluate.names),
    check=check,
    reads=list_read_sections,
    workload=workload,
    is_measurement=True,
    parts=lambda config: tuple(config.evaluate.names),
  ),
)
