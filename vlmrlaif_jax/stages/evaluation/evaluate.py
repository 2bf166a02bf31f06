"""The stage `eval`: each policy answers held-out questions, compared with truth.

The embedded world's truth is exact: a short answer is right or wrong, and of a
description it is known which statements nothing in the video supports, the rate of
hallucination (Rohrbach et al. 2018, 1809.02156) over all that is stated. Of a user's
own videos only a reference answer is known, which an answer meets word by word or not.
The judge that labelled the preferences compares the policies, too: where it sees more
progress than truth does, the policy has learned to please it.
"""

import functools
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from vlmrlaif_jax.core import distributed, jsonl, resumable
from vlmrlaif_jax.core.errors import (
  UserError,
  check_at_least,
  check_choices,
  user_errors,
)
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Params
from vlmrlaif_jax.data import features
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import measures, self_judge, world_truth
from vlmrlaif_jax.evals.bootstrap import Resampling
from vlmrlaif_jax.evals.measures import Marked
from vlmrlaif_jax.evals.summary import (
  PLAIN,
  POINTS,
  Line,
  at,
  compared,
  drop_intervals,
  largest_n,
  measure_rows,
)
from vlmrlaif_jax.feedback import pairwise_judge as judging
from vlmrlaif_jax.feedback import video_narrative
from vlmrlaif_jax.runtime import (
  answering,
  captioning,
  role_params,
  scoring,
  video,
  workloads,
)
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.evaluation import best_of_n
from vlmrlaif_jax.stages.stage import Rows, Stage, policies_of

Row: TypeAlias = dict[str, Any]
# The reward model's score of a text as the answer to each example.
Reward: TypeAlias = Callable[[Sequence[Example], Sequence[str]], Iterable[float]]

# Shown in per cent.
SHARES = ("accuracy", "by_kind", "hallucination", "recall", "stopped")


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      batch=64,  # Questions at once.
      temperature=0.0,  # 0: the likeliest answer.
      top_p=1.0,
      resamples=2000,  # Of the bootstrap.
      best_of=(),  # Counts, such as (4, 16), of answers whose best is measured, too.
      bon_by=("mean",),  # Rewards by which: per token, or of whole answers: "total".
      bon_ref="base",  # What DPO began with, or the "last" round.
      bon_temperature=1.0,
      judge=True,  # Whether the first policy judges, too.
      judge_share=1.0,  # Of the questions whose answers differ, that it is asked about.
      judge_context="none",  # The clips it is told of: "none", "one", "all".
    )
  )


def total_steps(run: Run) -> int:
  """Questions; each counts once all policies have answered it."""
  return len(run.splits.benchmark)


def check(config: ConfigDict) -> None:
  """Checks the section `evaluate`."""
  given = config.evaluate
  with user_errors("evaluate"):
    check_choices(given, {"bon_by": ("mean", "total"), "bon_ref": ("base", "last")})
    check_choices(given, {"judge_context": video_narrative.CONTEXTS})
    check_at_least(given, {"batch": 1, "temperature": 0, "resamples": 1})
    if not all(isinstance(count, int) and count > 0 for count in given.best_of):
      raise ValueError(f"best_of must hold counts above 0, not {given.best_of}")


def reads(config: ConfigDict) -> tuple[str, ...]:
  """Returns the other sections that the evaluation reads.

  Raises:
    UserError: a setting of the section `evaluate` has a wrong value.
  """
  check(config)  # A wrong `best_of` would otherwise look like a missing section.
  given = config.evaluate
  label = ("label",) if given.judge else ()  # How the judge is asked.
  return (*label, "dpo") if given.best_of else label  # Its beta.


def evaluate(run: Run, stage: str, folder: pathlib.Path, log: Log) -> Row:
  """Measures every policy in the workdir on the held-out questions."""
  reward: Reward | None = None
  if role_params.has_reward_model(run):
    reward = functools.partial(
      scoring.score_texts, run, role_params.reward_variables(run)
    )
  return measure_policies(run, policies_of(run), reward, folder, log)


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs to answer the questions."""
  config, data = run.config.evaluate, run.config.data
  policy = role_params.judge_variables(run, "sft")
  sampling = answering.sampling_of(run.config, "evaluate")
  tokens = config.batch * (data.prompt_len + data.response_len)
  each = [
    workloads.encode(run, config.batch),
    workloads.answer(run, policy, "answers", sampling, runs=1.0),
  ]
  return Workload(each, 0, config.batch, tokens)


def measure_policies(
  run: Run,
  policies: dict[str, Params],
  reward: Reward | None,
  folder: pathlib.Path,
  log: Log,
) -> Row:
  """Writes results.json and answers.jsonl into the folder, and returns a summary.

  Args:
    policies: variables of run.policy by name; "sft" and "ppo" are compared, or else
      the first and the last.
    reward: the reward model's scores; None to leave them out.
    log: of total_steps(run).
  """
  replies = ask_all(run, policies, folder, log)
  rows = [i for i, reply in enumerate(next(iter(replies.values()))) if reply.fits]
  examples = [run.splits.benchmark[i] for i in rows]
  report_left_out(run, len(examples), log)
  marked = {
    name: mark(examples, [said[i] for i in rows], reward)
    for name, said in replies.items()
  }
  videos = [features.name_of(example["video"]) for example in examples]
  how = Resampling(videos, run.config.seed, run.config.evaluate.resamples)
  pair = compared(policies)
  results = measures.measure_all(marked, pair, how)
  if run.config.evaluate.judge and pair[0] != pair[1]:
    log.note(f"eval: {pair[0]} judges its own answers and those of {pair[1]}")
    first, second = ([m.text for m in marked[name]] for name in pair)
    said = (first, second)
    judgements = judge(run, policies[pair[0]], examples, said, folder)
    wins, truths = self_judge.outcomes(judgements, examples, said)
    measures.add_judge(results, wins, truths, pair, how)
    counts = Counter(judgement.outcome.name for judgement in judgements.values())
    results["judge"] |= {"asked": len(judgements), "outcomes": dict(counts)}
  results |= {"pair": pair, "questions": len(examples), "videos": len(set(videos))}
  distributed.once(lambda: write(run, examples, marked, results, folder))
  log.table("Held-out questions: mean [95 % interval]", table(results))
  return summary(results)


# Answers.


def ask_all(
  run: Run, policies: dict[str, Params], folder: pathlib.Path, log: Log
) -> dict[str, list[answering.Reply]]:
  """Each policy's reply to each question, all written before any is judged."""
  examples = run.splits.benchmark
  requests = [answering.Request(e["id"], e["video"], e["question"]) for e in examples]
  sampling = answering.sampling_of(run.config, "evaluate")
  replies: dict[str, list[answering.Reply]] = {}
  for name, variables in policies.items():
    log.note(f"eval: {len(requests)} questions to {name}")
    before = len(replies) * len(requests)
    tell = lambda done, before=before: log.progress(
      (before + done) // len(policies), {}
    )
    path = folder / f"answers_{name}.jsonl"
    answerer = answering.Answerer(run, variables, sampling, path)
    replies[name] = [first for first, *_ in answerer.replies(requests, tell)]
  if run.config.evaluate.best_of:
    replies |= best_answers(run, policies, folder, log)
  return replies


def best_answers(
  run: Run, policies: dict[str, Params], folder: pathlib.Path, log: Log
) -> dict[str, list[answering.Reply]]:
  """The best of n answers of the last policy that DPO has trained; see best_of_n.py.

  Raises:
    UserError: there is no such policy.
  """
  config, trained = run.config.evaluate, [p for p in policies if role_params.is_dpo(p)]
  if not trained:
    raise UserError("evaluate.best_of needs a policy that DPO has trained; set it ()")
  name, most = trained[-1], max(config.best_of)
  before = role_params.start_of(name) if config.bon_ref == "last" else "sft"
  reference = policies.get(before, policies["sft"])  # SFT goes by another name here.
  log.note(f"eval: {most} answers of {name} to each question, for the best")
  sampling = answering.Sampling(
    run.config.data.prompt_len,
    run.config.data.response_len,
    config.batch,
    temperature=config.bon_temperature,
    samples=most,
  )
  found = best_of_n.kept(
    run,
    policies[name],
    reference,
    run.splits.benchmark,
    sampling,
    folder / f"best_of_{name}.jsonl",
    beta=run.config.dpo.beta,
  )
  rewards = {"mean": found.mean, "total": found.total}
  return {
    f"{name}@{count}" + (":total" if by == "total" else ""): best_of_n.best(
      found, rewards[by], count
    )
    for count in config.best_of
    for by in config.bon_by
  }


def report_left_out(run: Run, kept: int, log: Log) -> None:
  """Tells how many questions are not measured on, and what to do about it.

  Raises:
    UserError: none is left.
  """
  asked, longest = len(run.splits.benchmark), run.config.data.prompt_len
  said = (
    f"{asked - kept} of {asked} questions are longer than data.prompt_len={longest}"
  )
  if not kept:
    raise UserError(f"{said} tokens; raise it")
  if kept < asked:
    log.note(f"eval: {said} tokens and left out; raise it to measure on all")


def mark(
  examples: Sequence[Example], replies: Sequence[answering.Reply], reward: Reward | None
) -> list[Marked]:
  """What is known of a policy's answers."""
  texts = [reply.text for reply in replies]
  scores: list[float | None] = [None] * len(texts)
  if reward is not None:
    scores = [float(score) for score in reward(examples, texts)]
  return [
    Marked(reply.text, reply.stopped, world_truth.verdict(example, reply.text), score)
    for example, reply, score in zip(examples, replies, scores, strict=True)
  ]


# The judge.


def judge(
  run: Run,
  variables: Params,
  examples: Sequence[Example],
  said: self_judge.Texts,
  folder: pathlib.Path,
) -> dict[int, judging.Judgement]:
  """What a policy says as the judge, asked as it was for the preferences.

  Args:
    variables: of that policy.
  """
  config, label = run.config.evaluate, run.config.label
  rows = self_judge.unlike(said, share=config.judge_share, seed=run.config.seed)
  sampling = answering.Sampling(
    label.judge_prompt_len, label.judge_max_new, config.batch
  )

  ask = answering.Answerer(run, variables, sampling).ask
  # Captions are kept by the weights that made them.
  kept = folder / f"captions_{resumable.fingerprint(variables, sampling.facts())}.jsonl"
  told = captioning.narratives(
    run,
    variables,
    [examples[i] for i in rows],
    kept,
    which=config.judge_context,
    batch=config.batch,
  )
  return self_judge.judge(rows, examples, said, told, ask, run.prompts)


# What is told.


def write(
  run: Run,
  examples: Sequence[Example],
  marked: dict[str, list[Marked]],
  results: Row,
  folder: pathlib.Path,
) -> None:
  """The files that the report reads."""
  rows = [
    answer_row(run, example, {name: marked[name][i] for name in marked})
    for i, example in enumerate(examples)
  ]
  jsonl.write_records(folder / "answers.jsonl", rows)
  write_json(folder / "results.json", results)


def answer_row(run: Run, example: Example, marked: dict[str, Marked]) -> Row:
  """A question and each policy's answer, as the report shows them."""
  row = {
    "id": example["id"],
    "video": video.shown_video(run, example),
    "kind": next(iter(marked.values())).verdict.kind,
    "question": example["question"],
    "truth": example.get("truth", {}).get("answer", example["answer"]),
  }
  for name, (text, stopped, verdict, _) in marked.items():
    row[name] = {"text": text, "stopped": stopped, **verdict._asdict()}
  scores = {name: m.reward for name, m in marked.items() if m.reward is not None}
  return row | ({"reward": scores} if scores else {})


def table(results: Row) -> list[Row]:
  """Returns a row for each measure: every policy's value, and the difference."""
  policies = results["policies"]
  places: dict[str, tuple[str, ...]] = {}
  for stats in policies.values():
    for name in [*measures.MEASURES, "judge_score"]:
      if name in stats:
        places[name] = (name,)
      if name == "accuracy":
        places |= {f"  {kind}": ("by_kind", kind) for kind in stats["by_kind"]}
  lines = [
    Line(label, place, POINTS if place[0] in SHARES else PLAIN)
    for label, place in places.items()
  ]
  # A terminal has room for the intervals of three policies: of more, those of the pair.
  whole = lambda name: len(policies) < 4 or name in results["pair"]
  columns = {
    name: stats if whole(name) else drop_intervals(stats)
    for name, stats in policies.items()
  }
  rows = measure_rows(lines, columns | {"difference": results["difference"]})
  return [
    row | {"n": str(largest_n(at(stats, line.measure) for stats in policies.values()))}
    for row, line in zip(rows, lines, strict=True)
  ]


def summary(results: Row) -> Row:
  """The numbers that matter most, flat."""
  flat = {"questions": results["questions"], "videos": results["videos"]}
  for name in ("accuracy", "hallucination", "judge_score"):
    for policy, stats in results["policies"].items():
      if name in stats:
        flat[f"{policy}_{name}"] = stats[name]["mean"]
    if name in results["difference"]:
      flat[f"{name}_difference"] = results["difference"][name]["mean"]
  return flat


STAGES = (
  Stage(
    name="eval",
    title="Evaluation",
    section="evaluate",
    run=evaluate,
    total_steps=total_steps,
    check=check,
    reads=reads,
    batches=lambda config: {"evaluate.batch": Rows(config.evaluate.batch)},
    workload=workload,
    is_measurement=True,
  ),
)
