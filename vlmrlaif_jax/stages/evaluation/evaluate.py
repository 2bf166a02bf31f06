"""The stage `eval`: benchmarks of every policy in the workdir.

What stands in WORKDIR/eval:
  results.json     of each benchmark all scores, and the difference of two policies
  answers.jsonl    the answers of all policies to held-out questions, side by side
  endpoint.jsonl   the replies of a server, if one judges
  world/           files of the embedded world, for benchmarks that were given none
  held_out/judge_POLICY.jsonl    what the first policy says as the judge of pairs
  held_out/best_of_POLICY.jsonl  answers and their rewards, for the best of n
  NAME/POLICY/     of each benchmark and policy:
    answers.jsonl     each answer, before any is judged; a killed run resumes from these
    by_letter.jsonl   the log-probability of each option of a multiple choice; by_text
    judgements.jsonl  each reply of the judge, by all that it depends on
    rows.jsonl        each case with its values, or why it has none
    scores.json       the scores, and all that moves them
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
from vlmrlaif_jax.runtime import answering, role_params, scoring, video, workloads
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.evaluation import policies as asked_of
from vlmrlaif_jax.stages.evaluation import results
from vlmrlaif_jax.stages.evaluation.policies import EncodedRun, RewardFn
from vlmrlaif_jax.stages.stage import Stage, load_workdir_policies

EVALUATION_JUDGES = ("self", "endpoint", "exact")
SIMILARITIES = ("clip", "statements")
POOLING = "means over patches, means over frames"  # Of models.projector.pool.


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      names=(HELD_OUT,),  # Of all_benchmarks.
      batch=64,  # Questions, or cases to judge, at once.
      temperature=0.0,  # Of the answers. 0: the likeliest answer.
      top_p=1.0,
      prompt_len=0,  # Tokens of what a policy is asked, video included; 0: data's.
      resamples=2000,  # Of the bootstrap.
      # "self": the SFT policy, shown the video; "endpoint"; "exact": word for word,
      # where the embedded world's truth is known.
      judge="self",
      # Tokens of what the SFT policy is asked, video included, and of what it says.
      judge_prompt_len=2048,
      judge_max_new=64,
      judge_sees_video=False,  # Whether an endpoint is shown frames; the papers' are not.
      # How alike texts are: by "clip", or by the embedded world's own "statements".
      similarity="clip",
      clip="",  # A CLIP folder in Hugging Face's form.
      clip_cut=77,  # Characters of what a policy says that CLIP reads; 0: all.
      endpoint=endpoint.default_config(),
      # Files of each; "" where it can be made of the embedded world.
      **{name: each.default_config() for name, each in load_benchmarks().items()},
    )
  )


# What is checked before the first stage starts.


def check(config: ConfigDict) -> None:
  """Refuses, before anything is computed, what could not be measured.

  Raises:
    UserError: a setting is wrong, a file is missing or not in the benchmark's layout.
  """
  section = config.evaluate
  with user_errors("evaluate"):
    choices = dict(
      judge=EVALUATION_JUDGES, names=load_benchmarks(), similarity=SIMILARITIES
    )
    check_choices(section, choices)
    least = dict(temperature=0, prompt_len=0, resamples=1, clip_cut=0)
    check_at_least(section, least | dict(judge_prompt_len=1, judge_max_new=1))
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
    raise ValueError(f"{name}.questions is not given; {source.describe()}")
  if files.questions:
    if section.similarity == "statements" and benchmark.scoring == "similarity":
      raise ValueError(
        'similarity="statements" reads sentences of the embedded world alone, '
        f"and not those of evaluate.{name}: set it clip, and evaluate.clip"
      )
    if section.judge == "exact" and benchmark.scoring == "judge":
      raise ValueError(
        'judge="exact" compares words, which is fair in the embedded world alone, and '
        f"not to evaluate.{name}: set it self or endpoint"
      )
    if not files.videos or not pathlib.Path(files.videos).is_dir():
      raise ValueError(
        f"{name}.videos={files.videos!r} is no folder; {source.describe()}"
      )
    try:
      if benchmark.load:
        benchmark.load(files)
    except (FileNotFoundError, ValueError) as error:
      given = f"--config.evaluate.{name}.questions={files.questions}"
      raise UserError(f"{given}: {error}") from error


def list_read_sections(config: ConfigDict) -> tuple[str, ...]:
  """Returns the other sections that the evaluation reads.

  Raises:
    UserError: `evaluate.held_out.best_of` has a wrong value, which would otherwise look
      like a missing section.
  """
  given = config.evaluate
  if HELD_OUT not in given.names:
    return ()
  with user_errors(f"evaluate.{HELD_OUT}"):
    load_benchmarks()[HELD_OUT].check(given.held_out)
  label = ("label",) if given.held_out.judge else ()  # How the judge is asked.
  return (*label, "dpo") if given.held_out.best_of else label  # Its beta.


# What runs.


def run_evaluation(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Runs each benchmark with each policy of the workdir; see measure_policies."""
  reward: RewardFn | None = None
  if role_params.has_reward_model(run):
    variables = role_params.load_reward_model(run)
    reward = lambda run, examples, texts: scoring.score_texts(
      run, variables, examples, texts
    )
  return measure_policies(run, load_workdir_policies(run), reward, folder, log)


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs to answer the held-out questions."""
  config, data = run.config.evaluate, run.config.data
  policy = role_params.load_judge(run, "sft")
  sampling = answering.read_sampling_settings(run.config, "evaluate")
  tokens = config.batch * (data.prompt_len + data.response_len)
  each = [
    workloads.make_encode_function(run, config.batch),
    workloads.make_answer_function(run, policy, "answers", sampling, runs=1.0),
  ]
  return Workload(each, 0, config.batch, tokens)


def measure_policies(
  run: Run,
  policies: dict[str, Params],
  reward: RewardFn | None,
  folder: pathlib.Path,
  log: StageLog,
) -> dict[str, Any]:
  """Runs each benchmark with each policy.

  Args:
    run: models, data and settings.
    policies: variables of run.policy by name; "sft" judges if the judge is "self".
    reward: the reward model's scores; None to leave them out.
    folder: where the results are written.
    log: of as many steps as there are benchmarks.

  Returns:
    The means by "NAME.POLICY.MEASURE".
  """
  config = run.config.evaluate
  shown = EncodedRun(run, log, reward)
  judge = asked_of.make_judge(shown, policies["sft"], folder)
  benchmarks = [load_benchmarks()[name] for name in config.names]
  alike = STATEMENTS
  if config.similarity == "clip" and any(
    each.scoring == "similarity" for each in benchmarks
  ):
    alike = clip_similarity.make_clip_similarity(config.clip, cut=config.clip_cut)
  path = folder / "results.json"
  # Benchmarks that an earlier run of the stage has measured stay.
  found = distributed.on_process_zero(lambda: read_json(path, default={}))
  for number, benchmark in enumerate(benchmarks):
    name, shown.done = benchmark.name, number
    found[name] = measure_benchmark(shown, benchmark, policies, judge, alike, folder)
    distributed.on_process_zero(lambda: write_json(path, found))
    table = results.format_result(found[name], benchmark.shares)
    log.print_table(f"{name}: mean [95 % interval]", table)
    log.log_progress(number + 1, {})
  return {
    f"{name}.{policy}.{measure_benchmark}": value["mean"]
    for name in config.names
    for policy, scores in found[name]["policies"].items()
    for measure_benchmark, value in scores.items()
  }


def measure_benchmark(
  shown: EncodedRun,
  benchmark: Benchmark,
  policies: dict[str, Params],
  judge: CaseJudge,
  alike: Similarity,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Returns what a benchmark finds of each policy, which is written as well."""
  run, name, config = shown.run, benchmark.name, shown.run.config.evaluate
  files = prepare_files(run, benchmark, folder)
  items = benchmark.load(files) if benchmark.load else run.splits.benchmark
  counts = files.best_of if name == HELD_OUT else ()
  asked = asked_of.make_benchmark_policies(shown, policies, folder / name, counts)
  rows = {}
  for policy, each in asked.items():
    shown.log.print_note(f"eval: {name} with {policy}")
    batch = answering.BATCHES * config.batch
    kept = judging.cache_judge(judge, each.folder / "judgements.jsonl", batch)
    rows[policy] = benchmark.run(items, each.model(alike), kept, files)
  before, after = select_comparable(rows)
  if benchmark.compare and files.judge and before != after:
    shown.log.print_note(f"eval: {before} judges its own answers and those of {after}")
    file = folder / name / f"judge_{before}.jsonl"
    pair_judge = asked_of.make_pair_judge(shown, policies[before], file)
    pair = rows[before], rows[after]
    rows[before], rows[after] = benchmark.compare(items, pair, pair_judge)
  how = Resampling(seed=run.config.seed, resamples=config.resamples)
  scores = {policy: protocol.average_scores(each, how) for policy, each in rows.items()}
  by = {"judge": judge, "similarity": alike, "rules": None}[benchmark.scoring]
  recipe = describe_recipe(run, benchmark, files, items, by)
  for policy, each in asked.items():
    shown.log.print_note(results.summarize_coverage(scores[policy], each.problems))
    about = {"policy": policy, "weights": resumable.compute_fingerprint(each.variables)}
    told = (about, scores[policy], recipe, each.problems)
    distributed.on_process_zero(
      functools.partial(results.write_policy_result, each.folder, *told)
    )
  if name == HELD_OUT:
    answers = results.merge_policy_rows(run, rows)
    distributed.on_process_zero(
      lambda: jsonl.write_records(folder / "answers.jsonl", answers)
    )
  return results.make_benchmark_result(scores, how)


# Files, and what moves scores.


def prepare_files(run: Run, benchmark: Benchmark, folder: pathlib.Path) -> ConfigDict:
  """Returns a benchmark's settings; writes its files of the world if it has none.

  Raises:
    UserError: no files are given, and the data are not of the embedded world.
  """
  given, write = run.config.evaluate[benchmark.name], benchmark.world
  if write is None or given.questions:
    return given
  world_files.check_world_examples(run.splits.benchmark)
  videos = str(video.get_videos_folder(run))
  questions = distributed.on_process_zero(
    lambda: str(write(folder / "world", run.splits.benchmark, videos))
  )
  files = given.copy_and_resolve_references()
  files.update(questions=questions, videos=videos)
  return files


def describe_recipe(
  run: Run,
  benchmark: Benchmark,
  files: ConfigDict,
  items: Sequence,
  by: CaseJudge | Similarity | None,
) -> dict[str, Any]:
  """Returns all that a score depends on beside the weights of models.

  Video scores move by several points with each of these. The judge of pairs and the
  reward model are not among them.

  Args:
    run: the run.
    benchmark: the benchmark.
    files: its settings.
    items: what it asks.
    by: who judged, or what compared texts; None: rules did.
  """
  config = run.config
  sampling = answering.read_sampling_settings(config, "evaluate")._asdict()
  del sampling["batch"]  # No answer depends on it.
  named = (*benchmark.files, "videos")  # The hash of the files says more.
  asked = [(item["id"], item["question"]) for item in items if not benchmark.load]
  return {
    "benchmark": benchmark.name,
    "questions": protocol.hash_benchmark_files(benchmark, files)
    if benchmark.load
    else hashlib.sha256(repr(asked).encode()).hexdigest()[:16],
    "frames": config.model.frames,
    "resolution": run.policy.vision.image,
    "pooling": POOLING,
    "template": config.model.template,
    "sampling": sampling | {"seed": config.seed},
    "prompts": protocol.hash_prompts(benchmark.prompts),
    "judge": {"name": "rules"} if by is None else {"name": by.name, **by.facts},
    "settings": {k: v for k, v in files.items() if k not in named},
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
