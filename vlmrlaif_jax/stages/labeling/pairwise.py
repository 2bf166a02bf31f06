"""The stage `label`: preferences by AI feedback (VLM-RLAIF, 2402.03746, 3.2).

A model answers each prompt twice and captions the parts of the video. With the captions
in its prompt, it then judges which of its answers is better. The stage writes:
  preferences.jsonl   pairs with the same verdict in both orders of the answers
  rates.json          counts of the outcomes of all prompts
  blocks/*.jsonl      a row for each prompt; a killed run resumes from these files
  captions.jsonl      a caption of each clip
"""

import collections
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import distributed, jsonl
from vlmrlaif_jax.core.errors import (
  UserError,
  check_at_least,
  check_choices,
  subsection,
  user_errors,
)
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.profiling import PhaseTimer, format_shares
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params, Phase
from vlmrlaif_jax.data import templates
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.feedback import endpoint, pairwise_judge
from vlmrlaif_jax.feedback.pairwise_judge import AnswerPair, AskFn, PairOutcome
from vlmrlaif_jax.feedback.replies.verdicts import parse_verdict
from vlmrlaif_jax.runtime import answering, captioning, role_params, workloads
from vlmrlaif_jax.runtime.answering import SamplingSettings, VideoReply
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.video import get_report_path
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.labeling.preference_rows import (
  is_agreeing_with_truth,
  make_preference,
  read_block,
  write_block,
)
from vlmrlaif_jax.stages.stage import Stage

LABEL_JUDGES = ("self", "endpoint", "truth")
# Stage that reads the labels -> section whose `preferences` may name a file instead.
LABEL_READERS = {"rm": "rm", "grm_sft": "rm", "grm": "rm", "judges": "rm", "dpo": "dpo"}


def default_config() -> ConfigDict:
  """Returns the settings of the section `label`."""
  return ConfigDict(
    dict(
      # "self": the SFT policy; "endpoint": a server; "truth" of the embedded world, for
      # studies.
      judge="self",
      context="all",  # Clips with captions in the judge's prompt: "none", "one", "all".
      samples=4,  # Answers per prompt; the first two distinct ones are compared.
      temperature=1.0,  # Sampling temperature of the answers.
      top_p=1.0,
      judge_prompt_len=placeholder(int),  # Tokens of the judge's prompt with video.
      judge_max_new=placeholder(int),  # Tokens of a verdict; reasons may be cut off.
      caption_prompt_len=placeholder(int),  # Tokens of a caption's prompt with clip.
      caption_max_new=placeholder(int),  # Tokens of a caption.
      caption_temperature=0.0,
      batch=64,  # Prompts per batch.
      block=256,  # Prompts per block; a killed run loses one block at most.
      endpoint=endpoint.default_config(),
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `label`; raises UserError for an invalid value."""
  section = config.label
  with user_errors("label"):
    check_choices(section, {"judge": LABEL_JUDGES, "context": captioning.CONTEXTS})
    check_at_least(section, {"samples": 2, "temperature": 0})
    check_at_least(section, {"caption_temperature": 0, "judge_max_new": 1})
    if section.judge == "endpoint":
      with subsection("endpoint"):
        endpoint.check(section.endpoint)


def is_read(config: ConfigDict) -> bool:
  """Returns whether the recipe uses the labels.

  It does not if all stages that could read them have files of preferences. A recipe
  without these stages writes labels for other uses.
  """
  sections = {LABEL_READERS[name] for name in config.stages if name in LABEL_READERS}
  have_files = [name in config and config[name].preferences for name in sections]
  return not (have_files and all(have_files))


def count_label_blocks(run: Run) -> int:
  """Returns the number of blocks."""
  return math.ceil(len(run.splits.labels) / run.config.label.block)


def run_label_stage(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Labels run.splits.labels with the SFT policy, block by block.

  Returns:
    The content of rates.json; see compute_label_rates.

  Raises:
    UserError: A block contains other prompts, the ground truth is unknown, or a prompt
      for captions is too long.
  """
  variables = role_params.load_judge(run, "sft")
  prompts = run.splits.labels
  server: AskFn | None = None
  if run.config.label.judge == "endpoint":
    config = run.config.label.endpoint
    server = endpoint.Endpoint(config, run.workdir / "endpoint.jsonl").ask_or_stop
  if run.config.label.judge != "truth":
    captioning.check_clips(run, prompts, run.config.label.context)
  log.print_note(f"label: {len(prompts)} prompts in {count_label_blocks(run)} blocks")
  rows: list[JsonRow] = []
  phases = PhaseTimer()
  for number, block in enumerate(
    answering.split_blocks(len(prompts), run.config.label.block)
  ):
    examples = prompts[block.start : block.stop]
    path = folder / "blocks" / f"block_{number:05d}.jsonl"
    read = functools.partial(read_block, path, examples)
    known = distributed.on_process_zero(read)
    if known is None:
      run.watch.check(f"label: {number} of {count_label_blocks(run)} blocks are saved")
      with run.watch.step(number):
        captions = folder / "captions.jsonl"
        new = label_block(run, variables, examples, captions, phases, server)
      distributed.on_process_zero(functools.partial(write_block, path, new))
      known = distributed.on_process_zero(read)
    rows += known
    _log_rates(log, number + 1, rows, phases.take_seconds())
  videos = run.workdir / "world" / "videos"
  pairs = [
    make_preference(example, row, videos, judge_text=_format_verdicts(row))
    for example, row in zip(prompts, rows, strict=True)
    if row["preference"]
  ]
  summary = compute_label_rates(rows)
  write_preferences(folder, pairs, summary)
  _print_rates(log, summary)
  return summary


def write_preferences(
  folder: pathlib.Path, pairs: list[JsonRow], summary: dict[str, Any]
) -> None:
  """Writes the pairs for training and the rates for reports."""
  distributed.on_process_zero(
    lambda: jsonl.write_records(folder / "preferences.jsonl", pairs)
  )
  distributed.on_process_zero(lambda: write_json(folder / "rates.json", summary))


# One block.


def label_block(
  run: Run,
  variables: Params,
  examples: Sequence[Example],
  captions: pathlib.Path,
  phase: Phase,
  server: AskFn | None = None,
) -> list[JsonRow]:
  """Labels the prompts of a block and returns a row for each.

  Args:
    run: The run.
    variables: Variables of the SFT policy.
    examples: Prompts of the block.
    captions: File with the captions of all blocks.
    phase: Timer of the phases "sample", "caption" and "judge".
    server: Queries the judge of a server; None for the SFT policy.
  """
  config = run.config.label
  sampling = answering.read_sampling_settings(run.config, "label", config.samples)
  policy = answering.Answerer(run, variables, sampling)
  with phase("sample"):
    replies = policy.generate_replies(answering.make_queries(examples))
  answers = [select_distinct_pair(each) for each in replies]
  if config.judge == "truth":
    narratives = [""] * len(examples)
    outcomes = [*map(judge_by_mistakes, examples, answers)]
  else:
    with phase("caption"):
      narratives = captioning.caption_videos(
        run, variables, examples, captions, which=config.context, batch=config.batch
      )
    pairs = [
      AnswerPair(e["id"], e["video"], e["question"], a.text, b.text, narrative)
      for e, (a, b), narrative in zip(examples, answers, narratives, strict=True)
    ]
    # Temperature 0 makes verdicts deterministic.
    judge_sampling = SamplingSettings(
      config.judge_prompt_len, config.judge_max_new, config.batch
    )
    ask = server or answering.Answerer(run, variables, judge_sampling).ask_judge
    with phase("judge"):
      outcomes = pairwise_judge.judge_pairs(pairs, ask, run.prompts)
  columns = zip(examples, answers, narratives, outcomes, strict=True)
  return [_make_row(run, *each) for each in columns]


def judge_by_mistakes(
  example: Example, answers: tuple[VideoReply, VideoReply]
) -> PairOutcome:
  """Returns the verdict of the ground truth: the answer with fewer mistakes is better.

  Raises:
    UserError: The ground truth of the example is unknown.
  """
  first, second = (
    truth.count_answer_mistakes(example, reply.text) for reply in answers
  )
  if first is None or second is None:
    raise UserError(
      f"label.judge=truth, but example {example['id']} has no ground truth: it exists "
      "in the embedded world only; set --config.label.judge=self"
    )
  if first != second:
    return PairOutcome("kept", 1 if first < second else 2)
  same = answers[0].text == answers[1].text
  return PairOutcome("identical" if same else "tie")


def select_distinct_pair(
  replies: Sequence[VideoReply],
) -> tuple[VideoReply, VideoReply]:
  """Returns the first reply and the first with another text, else the second reply."""
  others = [reply for reply in replies[1:] if reply.text != replies[0].text]
  return replies[0], (others or replies[1:])[0]


def _make_row(
  run: Run,
  example: Example,
  answers: tuple[VideoReply, VideoReply],
  narrative: str,
  outcome: PairOutcome,
) -> JsonRow:
  if not answers[0].fits:  # The prompt is too long, so its answers are empty.
    outcome = outcome._replace(name="too_long", preference=None)
  return {
    "id": example["id"],
    "video": get_report_path(run, example),
    "question": templates.show_media(example["question"]),
    "outcome": outcome.name,
    "preference": outcome.preference,
    "outputs": [reply.text for reply in answers],
    "stopped": [reply.stopped for reply in answers],
    "verdicts": list(outcome.verdicts),
    "choices": [parse_verdict(text) for text in outcome.verdicts],
    "narrative": narrative,
    "mistakes": [truth.count_answer_mistakes(example, reply.text) for reply in answers],
  }


# Results.


def _format_verdicts(row: JsonRow) -> str:
  """Formats the verdicts for both orders, "" for the judge "truth"."""
  orders = zip(("1, 2", "2, 1"), row["verdicts"], strict=False)
  return "\n".join(f"Asked as ({order}): {text}" for order, text in orders)


def compute_label_rates(rows: Sequence[JsonRow]) -> dict[str, Any]:
  """Computes counts of the outcomes, and the accuracy of the pairs.

  "truth_agreement" is the accuracy of the "truth_pairs", whose answers differ in
  mistakes. "first_chosen" is the share of verdicts for the first answer: 0.5 without
  position bias.
  """
  counts = collections.Counter(row["outcome"] for row in rows)
  agreements = [x for x in map(is_agreeing_with_truth, rows) if x is not None]
  choices = [choice for row in rows for choice in row["choices"]]
  preferred = [row for row in rows if row["preference"]]
  count_words = lambda side: [
    len(row["outputs"][side(row)].split()) for row in preferred
  ]
  return {
    "prompts": len(rows),
    "asked": sum(counts[name] for name in pairwise_judge.JUDGED),
    **{name: counts[name] for name in pairwise_judge.PAIR_OUTCOMES},
    "truth_agreement": average_or_none(agreements),
    "truth_pairs": len(agreements),
    "first_chosen": average_or_none(
      [choice == "A" for choice in choices if choice in ("A", "B")]
    ),
    "chosen_words": average_or_none(count_words(lambda row: row["preference"] - 1)),
    "rejected_words": average_or_none(count_words(lambda row: 2 - row["preference"])),
  }


def average_or_none(values: Sequence[float | int]) -> float | None:
  """Computes the mean of values, None without values."""
  return sum(values) / len(values) if values else None


def _log_rates(
  log: StageLog, step: int, rows: Sequence[JsonRow], seconds: Mapping[str, float]
) -> None:
  """Logs shares of the pairs that are judged so far."""
  rates = compute_label_rates(rows)
  metrics = {
    name: rates[name] / max(rates["asked"], 1) for name in pairwise_judge.JUDGED
  }
  if rates["truth_pairs"]:
    metrics["truth_agreement"] = rates["truth_agreement"]
  log.log_metrics(step, metrics, seconds)
  log.log_progress(
    step, metrics, note=f"{len(rows)} prompts ({format_shares(seconds)})"
  )


def _print_rates(log: StageLog, summary: Mapping[str, Any]) -> None:
  total = max(summary["prompts"], 1)
  rows = [
    {"outcome": name, "pairs": summary[name], "share": f"{summary[name] / total:.1%}"}
    for name in pairwise_judge.PAIR_OUTCOMES
  ]
  log.print_table("Outcomes of the pairs", rows)
  if summary["truth_pairs"]:
    log.print_note(
      f"label: {summary['truth_agreement']:.1%} of the {summary['truth_pairs']} pairs "
      "with different numbers of mistakes prefer the answer with fewer"
    )


def workload(run: Run, stage: str) -> Workload:
  """Returns the workload of the stage."""
  config, data, model = run.config.label, run.config.data, run.config.model
  variables = role_params.load_judge(run, "sft")
  make_function = functools.partial(workloads.make_answer_function, run, variables)
  answers = answering.read_sampling_settings(run.config, "label", config.samples)
  captions = SamplingSettings(
    config.caption_prompt_len, config.caption_max_new, config.batch
  )
  judge = SamplingSettings(config.judge_prompt_len, config.judge_max_new, config.batch)
  clips = len(captioning.split_layout(run, run.processor.find_max_layout()))
  frames = model.clip_frames if run.processor.layout else 0
  tokens = config.batch * config.samples * (data.prompt_len + data.response_len)
  functions = [
    workloads.make_encode_function(run, config.batch),
    make_function("answers", answers, runs=1.0),
    make_function("captions", captions, runs=float(clips), frames=frames),
  ]
  if config.judge == "self":
    functions.append(make_function("judge", judge, runs=2.0))
  return Workload(functions, 0, config.batch, tokens)


STAGES = (
  Stage(
    name="label",
    title="Preference labels by the AI judge",
    section="label",
    run=run_label_stage,
    total_steps=count_label_blocks,
    check=check,
    is_needed=is_read,
    workload=workload,
    paper="2402.03746",
  ),
)
