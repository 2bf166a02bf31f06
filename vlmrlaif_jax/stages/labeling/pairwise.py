"""The stage `label`: preferences by AI feedback (VLM-RLAIF, 2402.03746, 3.2).

A model answers each prompt twice, captions the parts of the video, and judges, with
the captions before it, which of its answers is better. What it writes:
  preferences.jsonl   the pairs that both orders of the answers agree on
  rates.json          what became of all the others
  blocks/*.jsonl      every prompt, done or dropped; a killed run goes on from these
  captions.jsonl      every clip that was captioned, once
"""

import collections
import functools
import math
import os
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
  user_errors,
)
from vlmrlaif_jax.core.files import write_json
from vlmrlaif_jax.core.jsonl import JsonRow
from vlmrlaif_jax.core.profiling import PhaseTimer, format_shares
from vlmrlaif_jax.core.stage_log import StageLog
from vlmrlaif_jax.core.types import Params, Phase
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.feedback import pairwise_judge
from vlmrlaif_jax.feedback.pairwise_judge import AnswerPair, PairOutcome, parse_verdict
from vlmrlaif_jax.runtime import answering, captioning, role_params, workloads
from vlmrlaif_jax.runtime.answering import SamplingSettings, VideoReply
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.video import get_report_path
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.stage import Stage

LABEL_JUDGES = ("self", "truth")


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      judge="self",  # The SFT policy; or "truth", of the embedded world, for studies.
      context="all",  # Clips whose captions the judge is told: "none", "one", "all".
      samples=4,  # Answers to each prompt; the first two that differ are compared.
      temperature=1.0,  # Of the answers.
      top_p=1.0,
      judge_prompt_len=placeholder(int),  # Tokens, video included.
      judge_max_new=placeholder(int),  # The verdict; its reasons may be cut off.
      caption_prompt_len=placeholder(int),  # Tokens, the clip included.
      caption_max_new=placeholder(int),
      caption_temperature=0.0,
      batch=64,  # Prompts at once.
      block=256,  # Prompts; what a killed run loses at most.
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `label`."""
  given = config.label
  with user_errors("label"):
    check_choices(given, {"judge": LABEL_JUDGES, "context": captioning.CONTEXTS})
    check_at_least(given, {"samples": 2, "temperature": 0})
    check_at_least(given, {"caption_temperature": 0, "judge_max_new": 1})


def count_label_blocks(run: Run) -> int:
  """Blocks."""
  return math.ceil(len(run.splits.prompts) / run.config.label.block)


def run_label_stage(
  run: Run, stage: str, folder: pathlib.Path, log: StageLog
) -> dict[str, Any]:
  """Labels run.splits.prompts, block by block; what is done already is kept.

  The SFT policy answers, captions and judges.

  Returns:
    What rates.json holds; see `rates`.
  """
  variables = role_params.load_judge(run, "sft")
  prompts = run.splits.prompts
  log.print_note(f"label: {len(prompts)} prompts in {count_label_blocks(run)} blocks")
  rows: list[JsonRow] = []
  phases = PhaseTimer()
  for number, part in enumerate(
    answering.split_blocks(len(prompts), run.config.label.block)
  ):
    examples = prompts[part.start : part.stop]
    path = folder / "blocks" / f"block_{number:05d}.jsonl"
    if not distributed.on_process_zero(path.exists):
      run.watch.check(f"label: {number} of {count_label_blocks(run)} blocks are kept")
      with run.watch.step(number):
        captions = folder / "captions.jsonl"
        made = label_block(run, variables, examples, captions, phases)
      distributed.on_process_zero(functools.partial(jsonl.write_records, path, made))
    rows += distributed.on_process_zero(functools.partial(_read_block, path, examples))
    _tell(log, number + 1, rows, phases.take_seconds())
  kept = [each for each in zip(prompts, rows, strict=True) if each[1]["preference"]]
  videos = run.workdir / "world" / "videos"
  pairs = [make_preference(e, row, videos, told=_verdicts(row)) for e, row in kept]
  summary = compute_label_rates(rows)
  write_preferences(folder, pairs, summary)
  _show(log, summary)
  return summary


def write_preferences(
  folder: pathlib.Path, pairs: list[JsonRow], summary: dict[str, Any]
) -> None:
  """Writes the pairs and what became of the others, for training and for reports."""
  distributed.on_process_zero(
    lambda: jsonl.write_records(folder / "preferences.jsonl", pairs)
  )
  distributed.on_process_zero(lambda: write_json(folder / "rates.json", summary))


def _read_block(path: pathlib.Path, examples: Sequence[Example]) -> list[JsonRow]:
  rows = jsonl.read_jsonl(path)
  if [row["id"] for row in rows] != [example["id"] for example in examples]:
    raise UserError(
      f"{path} holds other prompts than this run has: remove {path.parent}, or put "
      "label.block, the seed and the data back to what they were"
    )
  return rows


# One block.


def label_block(
  run: Run,
  variables: Params,
  examples: Sequence[Example],
  captions: pathlib.Path,
  phase: Phase,
) -> list[JsonRow]:
  """What becomes of each prompt.

  Args:
    captions: the file of those made so far.
    phase: books "sample", "caption" and "judge".
  """
  config = run.config.label
  sampling = answering.read_sampling_settings(run.config, "label", config.samples)
  policy = answering.Answerer(run, variables, sampling)
  with phase("sample"):
    replies = policy.generate_replies(answering.make_queries(examples))
  answers = [first_distinct_pair(each) for each in replies]
  if config.judge == "truth":
    told, outcomes = [""] * len(examples), [*map(judge_by_mistakes, examples, answers)]
  else:
    with phase("caption"):
      told = captioning.caption_videos(
        run, variables, examples, captions, which=config.context, batch=config.batch
      )
    pairs = [
      AnswerPair(e["id"], e["video"], e["question"], a.text, b.text, narrative)
      for e, (a, b), narrative in zip(examples, answers, told, strict=True)
    ]
    # At temperature 0: nothing about a verdict is random.
    judge = SamplingSettings(
      config.judge_prompt_len, config.judge_max_new, config.batch
    )
    ask = answering.Answerer(run, variables, judge).ask_judge
    with phase("judge"):
      outcomes = pairwise_judge.judge_pairs(pairs, ask, run.prompts)
  made = zip(examples, answers, told, outcomes, strict=True)
  return [_row(run, *each) for each in made]


def judge_by_mistakes(
  example: Example, answers: tuple[VideoReply, VideoReply]
) -> PairOutcome:
  """As somebody who knows all would judge: the fewer mistakes, the better."""
  first, second = (
    truth.count_answer_mistakes(example, reply.text) for reply in answers
  )
  if first is None or second is None:
    raise UserError(
      f"label.judge=truth, but of {example['id']} the truth is not known: it is of the "
      'embedded world alone; set label.judge="self"'
    )
  if first != second:
    return PairOutcome("kept", 1 if first < second else 2)
  same = answers[0].text == answers[1].text
  return PairOutcome("identical" if same else "tie")


def first_distinct_pair(replies: Sequence[VideoReply]) -> tuple[VideoReply, VideoReply]:
  """The first reply and the first that says something else; the second if none does."""
  others = [reply for reply in replies[1:] if reply.text != replies[0].text]
  return replies[0], (others or replies[1:])[0]


def _row(
  run: Run,
  example: Example,
  answers: tuple[VideoReply, VideoReply],
  narrative: str,
  outcome: PairOutcome,
) -> JsonRow:
  if not answers[0].fits:  # Its answers are empty, but that is not why.
    outcome = outcome._replace(name="too_long", preference=None)
  return {
    "id": example["id"],
    "video": get_report_path(run, example),
    "question": example["question"],
    "outcome": outcome.name,
    "preference": outcome.preference,
    "outputs": [reply.text for reply in answers],
    "stopped": [reply.stopped for reply in answers],
    "verdicts": list(outcome.verdicts),
    "choices": [parse_verdict(text) for text in outcome.verdicts],
    "narrative": narrative,
    "mistakes": [truth.count_answer_mistakes(example, reply.text) for reply in answers],
  }


# What comes out.


def _verdicts(row: JsonRow) -> str:
  """What the judge said in both orders; "" if it was the truth."""
  orders = zip(("1, 2", "2, 1"), row["verdicts"], strict=False)
  return "\n".join(f"Asked as ({order}): {text}" for order, text in orders)


def make_preference(
  example: Example, row: JsonRow, videos: pathlib.Path, *, told: str
) -> JsonRow:
  """A kept pair as records.read_preferences takes it, with what the report shows.

  Args:
    videos: videos below this folder are named from it, so that a workdir can be moved.
    told: what the judge said.
  """
  video, outputs = example["video"], row["outputs"]
  said = lambda who, text: {"from": who, "value": text}
  named = lambda path: (
    os.path.relpath(path, videos) if pathlib.Path(path).is_relative_to(videos) else path
  )
  place = {"video": named(video)} if isinstance(video, str) else {}
  return {
    "id": row["id"],
    **(place or {"images": [named(path) for path in video]}),
    "src_data": example["source"],
    "conversations": [
      said("human", f"<image>\n{example['question']}"),
      said("gpt", outputs[row["preference"] - 1]),
    ],
    "question": example["question"],
    "output_1": said("gpt", outputs[0]),
    "output_2": said("gpt", outputs[1]),
    "preference": row["preference"],
    "judge": told,
    "judge_text": told,
    "narrative": row["narrative"],
    "agrees_with_truth": is_agreeing_with_truth(row),
    "flags": {"stopped": row["stopped"]},
    **({"truth": example["truth"]} if "truth" in example else {}),
  }


def is_agreeing_with_truth(row: Mapping[str, Any]) -> bool | None:
  """Whether the preferred answer makes fewer mistakes; None if none is preferred,
  both make as many, or the truth is not known.
  """
  first, second = row["mistakes"]
  if row["preference"] is None or first is None or first == second:
    return None
  return (first < second) == (row["preference"] == 1)


def compute_label_rates(rows: Sequence[JsonRow]) -> dict[str, Any]:
  """How many prompts there are, how many pairs were judged, what became of each.

  "asked" is the sum of the outcomes in pairwise_judge.JUDGED. "truth_agreement" is a
  share of "truth_pairs": the kept ones of which the hidden truth says which answer is
  better. "first_chosen" is the share of choices that are of the answer shown first: 0.5
  where the place does not sway the judge.
  """
  counts = collections.Counter(row["outcome"] for row in rows)
  checked = [
    agreed for agreed in map(is_agreeing_with_truth, rows) if agreed is not None
  ]
  chosen = [choice for row in rows for choice in row["choices"]]
  kept = [row for row in rows if row["preference"]]
  words = lambda side: [len(row["outputs"][side(row)].split()) for row in kept]
  return {
    "prompts": len(rows),
    "asked": sum(counts[name] for name in pairwise_judge.JUDGED),
    **{name: counts[name] for name in pairwise_judge.PAIR_OUTCOMES},
    "truth_agreement": mean_or_none(checked),
    "truth_pairs": len(checked),
    "first_chosen": mean_or_none(
      [choice == "A" for choice in chosen if choice in ("A", "B")]
    ),
    "chosen_words": mean_or_none(words(lambda row: row["preference"] - 1)),
    "rejected_words": mean_or_none(words(lambda row: 2 - row["preference"])),
  }


def mean_or_none(values: Sequence[float | int]) -> float | None:
  return sum(values) / len(values) if values else None


def _tell(
  log: StageLog, step: int, rows: Sequence[JsonRow], seconds: Mapping[str, float]
) -> None:
  """Shares of the pairs judged so far."""
  found = compute_label_rates(rows)
  metrics = {
    name: found[name] / max(found["asked"], 1) for name in pairwise_judge.JUDGED
  }
  if found["truth_pairs"]:
    metrics["truth_agreement"] = found["truth_agreement"]
  log.log_metrics(step, metrics, seconds)
  log.log_progress(
    step, metrics, note=f"{len(rows)} prompts ({format_shares(seconds)})"
  )


def _show(log: StageLog, summary: Mapping[str, Any]) -> None:
  total = max(summary["prompts"], 1)
  rows = [
    {"outcome": name, "pairs": summary[name], "share": f"{summary[name] / total:.1%}"}
    for name in pairwise_judge.PAIR_OUTCOMES
  ]
  log.print_table("What became of the pairs", rows)
  if summary["truth_pairs"]:
    log.print_note(
      f"label: {summary['truth_agreement']:.1%} of the {summary['truth_pairs']} kept "
      "pairs that truth can tell apart are as truth has them"
    )


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs."""
  config, data, model = run.config.label, run.config.data, run.config.model
  variables = role_params.load_judge(run, "sft")
  ask = functools.partial(workloads.make_answer_function, run, variables)
  answers = answering.read_sampling_settings(run.config, "label", config.samples)
  captions = SamplingSettings(
    config.caption_prompt_len, config.caption_max_new, config.batch
  )
  judge = SamplingSettings(config.judge_prompt_len, config.judge_max_new, config.batch)
  clips = -(-model.frames // model.clip_frames)
  tokens = config.batch * config.samples * (data.prompt_len + data.response_len)
  each = [
    workloads.make_encode_function(run, config.batch),
    ask("answers", answers, runs=1.0),
    ask("captions", captions, runs=float(clips), frames=model.clip_frames),
    ask("judge", judge, runs=2.0),
  ]
  return Workload(each, 0, config.batch, tokens)


STAGES = (
  Stage(
    name="label",
    title="Preference labels by the AI judge",
    section="label",
    run=run_label_stage,
    total_steps=count_label_blocks,
    check=check,
    workload=workload,
    paper="2402.03746",
  ),
)
