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
from vlmrlaif_jax.core.profiling import Phases, shares
from vlmrlaif_jax.core.stage_log import Log
from vlmrlaif_jax.core.types import Params, Phase
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world_truth as truth
from vlmrlaif_jax.feedback import pairwise_judge
from vlmrlaif_jax.feedback.pairwise_judge import Outcome, Pair, parse_verdict
from vlmrlaif_jax.runtime import answering, captioning, role_params, workloads
from vlmrlaif_jax.runtime.answering import Reply, Sampling
from vlmrlaif_jax.runtime.run import Run
from vlmrlaif_jax.runtime.video import shown_video
from vlmrlaif_jax.runtime.workloads import Workload
from vlmrlaif_jax.stages.stage import Stage

JUDGES = ("self", "truth")
Row = dict[str, Any]  # What became of a prompt: a line of a block's file.


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
    check_choices(given, {"judge": JUDGES, "context": captioning.CONTEXTS})
    check_at_least(given, {"samples": 2, "temperature": 0})
    check_at_least(given, {"caption_temperature": 0, "judge_max_new": 1})


def total_steps(run: Run) -> int:
  """Blocks."""
  return math.ceil(len(run.splits.prompts) / run.config.label.block)


def label(run: Run, stage: str, folder: pathlib.Path, log: Log) -> dict[str, Any]:
  """Labels run.splits.prompts, block by block; what is done already is kept.

  The SFT policy answers, captions and judges.

  Returns:
    What rates.json holds; see `rates`.
  """
  variables = role_params.judge_variables(run, "sft")
  prompts = run.splits.prompts
  log.note(f"label: {len(prompts)} prompts in {total_steps(run)} blocks")
  rows: list[Row] = []
  phases = Phases()
  for number, part in enumerate(answering.blocks(len(prompts), run.config.label.block)):
    examples = prompts[part.start : part.stop]
    path = folder / "blocks" / f"block_{number:05d}.jsonl"
    if not distributed.once(path.exists):
      run.watch.check(f"label: {number} of {total_steps(run)} blocks are kept")
      with run.watch.step(number):
        captions = folder / "captions.jsonl"
        made = label_block(run, variables, examples, captions, phases)
      distributed.once(functools.partial(jsonl.write_records, path, made))
    rows += distributed.once(functools.partial(_read_block, path, examples))
    _tell(log, number + 1, rows, phases.taken())
  kept = [each for each in zip(prompts, rows, strict=True) if each[1]["preference"]]
  videos = run.workdir / "world" / "videos"
  pairs = [preference_row(e, row, videos, told=_verdicts(row)) for e, row in kept]
  summary = rates(rows)
  write(folder, pairs, summary)
  _show(log, summary)
  return summary


def write(folder: pathlib.Path, pairs: list[Row], summary: dict[str, Any]) -> None:
  """Writes the pairs and what became of the others, for training and for reports."""
  distributed.once(lambda: jsonl.write_records(folder / "preferences.jsonl", pairs))
  distributed.once(lambda: write_json(folder / "rates.json", summary))


def _read_block(path: pathlib.Path, examples: Sequence[Example]) -> list[Row]:
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
) -> list[Row]:
  """What becomes of each prompt.

  Args:
    captions: the file of those made so far.
    phase: books "sample", "caption" and "judge".
  """
  config = run.config.label
  sampling = answering.sampling_of(run.config, "label", config.samples)
  policy = answering.Answerer(run, variables, sampling)
  with phase("sample"):
    replies = policy.replies(answering.questions(examples))
  answers = [first_unlike(each) for each in replies]
  if config.judge == "truth":
    told, outcomes = [""] * len(examples), [*map(by_truth, examples, answers)]
  else:
    with phase("caption"):
      told = captioning.narratives(
        run, variables, examples, captions, which=config.context, batch=config.batch
      )
    pairs = [
      Pair(e["id"], e["video"], e["question"], a.text, b.text, narrative)
      for e, (a, b), narrative in zip(examples, answers, told, strict=True)
    ]
    # At temperature 0: nothing about a verdict is random.
    judge = Sampling(config.judge_prompt_len, config.judge_max_new, config.batch)
    ask = answering.Answerer(run, variables, judge).ask
    with phase("judge"):
      outcomes = pairwise_judge.judge_pairs(pairs, ask, run.prompts)
  made = zip(examples, answers, told, outcomes, strict=True)
  return [_row(run, *each) for each in made]


def by_truth(example: Example, answers: tuple[Reply, Reply]) -> Outcome:
  """As somebody who knows all would judge: the fewer mistakes, the better."""
  first, second = (truth.mistakes(example, reply.text) for reply in answers)
  if first is None or second is None:
    raise UserError(
      f"label.judge=truth, but of {example['id']} the truth is not known: it is of the "
      'embedded world alone; set label.judge="self"'
    )
  if first != second:
    return Outcome("kept", 1 if first < second else 2)
  same = answers[0].text == answers[1].text
  return Outcome("identical" if same else "tie")


def first_unlike(replies: Sequence[Reply]) -> tuple[Reply, Reply]:
  """The first reply and the first that says something else; the second if none does."""
  others = [reply for reply in replies[1:] if reply.text != replies[0].text]
  return replies[0], (others or replies[1:])[0]


def _row(
  run: Run,
  example: Example,
  answers: tuple[Reply, Reply],
  narrative: str,
  outcome: Outcome,
) -> Row:
  if not answers[0].fits:  # Its answers are empty, but that is not why.
    outcome = outcome._replace(name="too_long", preference=None)
  return {
    "id": example["id"],
    "video": shown_video(run, example),
    "question": example["question"],
    "outcome": outcome.name,
    "preference": outcome.preference,
    "outputs": [reply.text for reply in answers],
    "stopped": [reply.stopped for reply in answers],
    "verdicts": list(outcome.verdicts),
    "choices": [parse_verdict(text) for text in outcome.verdicts],
    "narrative": narrative,
    "mistakes": [truth.mistakes(example, reply.text) for reply in answers],
  }


# What comes out.


def _verdicts(row: Row) -> str:
  """What the judge said in both orders; "" if it was the truth."""
  orders = zip(("1, 2", "2, 1"), row["verdicts"], strict=False)
  return "\n".join(f"Asked as ({order}): {text}" for order, text in orders)


def preference_row(
  example: Example, row: Row, videos: pathlib.Path, *, told: str
) -> Row:
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
    "agrees_with_truth": agrees_with_truth(row),
    "flags": {"stopped": row["stopped"]},
    **({"truth": example["truth"]} if "truth" in example else {}),
  }


def agrees_with_truth(row: Mapping[str, Any]) -> bool | None:
  """Whether the preferred answer makes fewer mistakes; None if none is preferred,
  both make as many, or the truth is not known.
  """
  first, second = row["mistakes"]
  if row["preference"] is None or first is None or first == second:
    return None
  return (first < second) == (row["preference"] == 1)


def rates(rows: Sequence[Row]) -> dict[str, Any]:
  """How many prompts there are, how many pairs were judged, what became of each.

  "asked" is the sum of the outcomes in pairwise_judge.JUDGED. "truth_agreement" is a
  share of "truth_pairs": the kept ones of which the hidden truth says which answer is
  better. "first_chosen" is the share of choices that are of the answer shown first: 0.5
  where the place does not sway the judge.
  """
  counts = collections.Counter(row["outcome"] for row in rows)
  checked = [agreed for agreed in map(agrees_with_truth, rows) if agreed is not None]
  chosen = [choice for row in rows for choice in row["choices"]]
  kept = [row for row in rows if row["preference"]]
  words = lambda side: [len(row["outputs"][side(row)].split()) for row in kept]
  return {
    "prompts": len(rows),
    "asked": sum(counts[name] for name in pairwise_judge.JUDGED),
    **{name: counts[name] for name in pairwise_judge.OUTCOMES},
    "truth_agreement": mean(checked),
    "truth_pairs": len(checked),
    "first_chosen": mean([choice == "A" for choice in chosen if choice in ("A", "B")]),
    "chosen_words": mean(words(lambda row: row["preference"] - 1)),
    "rejected_words": mean(words(lambda row: 2 - row["preference"])),
  }


def mean(values: Sequence[float | int]) -> float | None:
  return sum(values) / len(values) if values else None


def _tell(
  log: Log, step: int, rows: Sequence[Row], seconds: Mapping[str, float]
) -> None:
  """Shares of the pairs judged so far."""
  found = rates(rows)
  metrics = {
    name: found[name] / max(found["asked"], 1) for name in pairwise_judge.JUDGED
  }
  if found["truth_pairs"]:
    metrics["truth_agreement"] = found["truth_agreement"]
  log.metrics(step, metrics, seconds)
  log.progress(step, metrics, note=f"{len(rows)} prompts ({shares(seconds)})")


def _show(log: Log, summary: Mapping[str, Any]) -> None:
  total = max(summary["prompts"], 1)
  rows = [
    {"outcome": name, "pairs": summary[name], "share": f"{summary[name] / total:.1%}"}
    for name in pairwise_judge.OUTCOMES
  ]
  log.table("What became of the pairs", rows)
  if summary["truth_pairs"]:
    log.note(
      f"label: {summary['truth_agreement']:.1%} of the {summary['truth_pairs']} kept "
      "pairs that truth can tell apart are as truth has them"
    )


def workload(run: Run, stage: str) -> Workload:
  """Returns what the stage runs."""
  config, data, model = run.config.label, run.config.data, run.config.model
  variables = role_params.judge_variables(run, "sft")
  ask = functools.partial(workloads.answer, run, variables)
  answers = answering.sampling_of(run.config, "label", config.samples)
  captions = Sampling(config.caption_prompt_len, config.caption_max_new, config.batch)
  judge = Sampling(config.judge_prompt_len, config.judge_max_new, config.batch)
  clips = -(-model.frames // model.clip_frames)
  tokens = config.batch * config.samples * (data.prompt_len + data.response_len)
  each = [
    workloads.encode(run, config.batch),
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
    run=label,
    total_steps=total_steps,
    check=check,
    workload=workload,
    paper="2402.03746",
  ),
)
