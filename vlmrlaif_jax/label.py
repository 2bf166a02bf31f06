"""PROGRAM: preferences by AI feedback (VLM-RLAIF, 2402.03746, 3.2).

A model answers each prompt twice, captions the parts of the video, and judges, with
the captions before it, which of its answers is better. What it writes:
  preferences.jsonl   the pairs that both orders of the answers agree on
  rates.json          what became of all the others
  blocks/*.jsonl      every prompt, done or dropped; a killed run goes on from these
  captions.jsonl      every clip that was captioned, once
"""

import collections
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlmrlaif_jax import answer, build
from vlmrlaif_jax.data import features, records
from vlmrlaif_jax.data.records import Example
from vlmrlaif_jax.evals import world as truth
from vlmrlaif_jax.feedback import context, judge
from vlmrlaif_jax.log import Log, replace_text
from vlmrlaif_jax.types import Params

Row = dict[str, Any]  # What became of a prompt: a line of a block's file.
OUTCOMES = (*judge.JUDGED, *judge.UNJUDGED)


def default_config() -> ConfigDict:
  return ConfigDict(dict(
    context="all",  # The clips whose captions the judge is told: "none", "one", "all".
    samples=2,  # Answers to each prompt; the first two that differ are compared.
    temperature=1.0,  # Of the answers.
    top_p=1.0,
    judge_prompt_len=224,  # Tokens, video included.
    judge_max_new=12,  # The verdict; its reasons may be cut off.
    caption_prompt_len=40,  # Tokens, the clip included.
    caption_max_new=48,
    caption_temperature=0.0,
    batch=64,  # Prompts at once.
    block=256,  # Prompts; what a killed run loses at most.
  ))


def total_blocks(run: build.Run) -> int:
  """How many steps the stage's log counts."""
  return math.ceil(len(run.splits.prompts) / run.config.label.block)


def run_stage(
  run: build.Run, variables: Params, folder: pathlib.Path, log: Log
) -> dict[str, Any]:
  """Labels run.splits.prompts, block by block; what is done already is kept.

  Args:
    variables: of run.policy; it answers, captions and judges.

  Returns:
    What rates.json holds; see `rates`.
  """
  _check(run.config.label)
  prompts = run.splits.prompts
  captions = Captions(folder / "captions.jsonl")
  rows: list[Row] = []
  for number, part in enumerate(answer.blocks(len(prompts), run.config.label.block)):
    examples = prompts[part.start : part.stop]
    path = folder / "blocks" / f"block_{number:05d}.jsonl"
    if not path.exists():
      records.write_records(path, label_block(run, variables, examples, captions))
    rows += _read_block(path, examples)
    _tell(log, number + 1, rows)
  records.write_records(folder / "preferences.jsonl", [
    preference_row(example, row)
    for example, row in zip(prompts, rows, strict=True) if row["outcome"] == "kept"])
  summary = rates(rows)
  replace_text(folder / "rates.json", json.dumps(summary, indent=2))
  _show(log, summary)
  return summary


def _check(config: ConfigDict) -> None:
  """Raises early what would else come up after the first answers."""
  context.choose(config.context, [""])
  if config.samples < 2:
    raise ValueError(f"label.samples must be 2 or more, not {config.samples}")


def _read_block(path: pathlib.Path, examples: Sequence[Example]) -> list[Row]:
  rows = records.read_jsonl(path)
  if [row["id"] for row in rows] != [example["id"] for example in examples]:
    raise ValueError(
      f"{path} holds other prompts than this run has: remove {path.parent}, or put "
      "label.block, the seed and the data back to what they were")
  return rows


# One block ------------------------------------------------------------------------


def label_block(
  run: build.Run, variables: Params, examples: Sequence[Example], captions: "Captions"
) -> list[Row]:
  """What becomes of each prompt."""
  config = run.config.label
  reply = functools.partial(answer.answer, run, variables, seed=run.config.seed)
  replies = reply(
    [answer.Request(f"answer:{e['id']}", e["video"], e["question"]) for e in examples],
    answer.Sampling(run.config.data.prompt_len, run.config.data.response_len,
                    config.batch, config.temperature, config.top_p,
                    samples=config.samples))
  answers = [first_unlike(texts) for texts in replies]
  told = _narratives(run, reply, examples, captions)
  judgements = judge.judge_pairs(
    [judge.Pair(e["id"], e["video"], e["question"], a.text, b.text, narrative)
     for e, (a, b), narrative in zip(examples, answers, told, strict=True)],
    functools.partial(_verdicts, config, reply), run.prompts)
  return [_row(*each) for each in zip(examples, answers, told, judgements, strict=True)]


def first_unlike(replies: Sequence[answer.Reply]) -> tuple[answer.Reply, answer.Reply]:
  """The first reply and the first that says something else; the second if none does."""
  others = [reply for reply in replies[1:] if reply.text != replies[0].text]
  return replies[0], (others or replies[1:])[0]


def _verdicts(
  config: ConfigDict, reply: Callable, queries: Sequence[judge.Query]
) -> list[str | None]:
  """What the model says as the judge: its likeliest words, so that nothing is random."""
  requests = [answer.Request(q.id, q.video, q.prompt) for q in queries]
  replies = reply(requests, answer.Sampling(
    config.judge_prompt_len, config.judge_max_new, config.batch))
  return [first.text if first.fits else None for first, *_ in replies]


def _row(
  example: Example,
  answers: tuple[answer.Reply, answer.Reply],
  narrative: str,
  judgement: judge.Judgement,
) -> Row:
  outcome = judgement.outcome
  if not answers[0].fits:  # Its answers are empty, but that is not why.
    outcome = judge.Outcome("too_long")
  return {
    "id": example["id"],
    "outcome": outcome.name,
    "preference": outcome.preference,
    "outputs": [reply.text for reply in answers],
    "stopped": [reply.stopped for reply in answers],
    "verdicts": [verdict.text for verdict in judgement.verdicts],
    "narrative": narrative,
    "mistakes": [truth.mistakes(example, reply.text) for reply in answers],
  }


# Captions -------------------------------------------------------------------------


class Captions(dict[context.Clip, str]):
  """Captions by clip, those in a file to begin with."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    rows = records.read_jsonl(path) if path.exists() else []
    super().__init__(
      (context.Clip(r["video"], r["start"], r["stop"]), r["caption"]) for r in rows)

  def add(self, clips: Sequence[context.Clip], texts: Sequence[str]) -> None:
    """Takes up captions, and writes them to the file."""
    made = dict(zip(clips, texts, strict=True))
    self.update(made)
    records.append_jsonl(
      self.path, [{**c._asdict(), "caption": text} for c, text in made.items()])


def _narratives(
  run: build.Run, reply: Callable, examples: Sequence[Example], captions: Captions
) -> list[str]:
  """What the judge is told of each example's video."""
  model, config = run.config.model, run.config.label
  spans = context.choose(
    config.context, context.clip_spans(model.frames, model.clip_frames))
  # A video goes by the name of its features, which depends on what it shows and not
  # on where it lies; so does what is sampled.
  name = lambda video: run.features.files[features.name_of(video)].stem
  videos = {name(e["video"]): e["video"] for e in examples}
  sampling = answer.Sampling(config.caption_prompt_len, config.caption_max_new,
                             config.batch, config.caption_temperature)

  def ask(clips):
    requests = [
      answer.Request(f"caption:{c.start}:{c.video}", videos[c.video],
                     run.prompts.caption, c.start, c.stop)
      for c in clips]
    replies = [first for first, *_ in reply(requests, sampling)]
    if not all(first.fits for first in replies):
      raise ValueError(
        f"the prompt for captions does not fit label.caption_prompt_len="
        f"{config.caption_prompt_len} with a clip of {clips[0].stop - clips[0].start} "
        "frames: raise it, or lower model.clip_frames")
    captions.add(clips, [first.text for first in replies])
    return [first.text for first in replies]

  return context.describe([name(e["video"]) for e in examples], spans, ask, captions)


# What comes out -------------------------------------------------------------------


def preference_row(example: Example, row: Row) -> Row:
  """A kept pair as records.read_preferences takes it, with what the report shows."""
  first, second = row["outputs"]
  video = example["video"]
  better = row["outputs"][row["preference"] - 1]
  said = "\n".join(
    f"Asked as ({order}): {text}"
    for order, text in zip(("1, 2", "2, 1"), row["verdicts"], strict=True))
  return {
    "id": row["id"],
    ("video" if isinstance(video, str) else "images"): video,
    "src_data": example["source"],
    "conversations": [
      {"from": "human", "value": f"<image>\n{example['question']}"},
      {"from": "gpt", "value": better}],
    "question": example["question"],
    "output_1": {"from": "gpt", "value": first},
    "output_2": {"from": "gpt", "value": second},
    "preference": row["preference"],
    "judge": said,
    "judge_text": said,
    "narrative": row["narrative"],
    "agrees_with_truth": agrees_with_truth(row),
    "flags": {"stopped": row["stopped"]},
    **({"truth": example["truth"]} if "truth" in example else {}),
  }


def agrees_with_truth(row: Mapping[str, Any]) -> bool | None:
  """Whether the preferred answer makes fewer mistakes; None if none is preferred,
  both make as many, or the truth is not known."""
  first, second = row["mistakes"]
  if row["preference"] is None or first is None or first == second:
    return None
  return (first < second) == (row["preference"] == 1)


def rates(rows: Sequence[Row]) -> dict[str, Any]:
  """How many prompts there are, how many pairs were judged, what became of each.

  "asked" is the sum of the outcomes in judge.JUDGED. "truth_agreement" is a share of
  "truth_pairs": the kept ones of which the hidden truth says which answer is better.
  """
  counts = collections.Counter(row["outcome"] for row in rows)
  checked = [agreed for agreed in map(agrees_with_truth, rows) if agreed is not None]
  return {
    "prompts": len(rows),
    "asked": sum(counts[name] for name in judge.JUDGED),
    **{name: counts[name] for name in OUTCOMES},
    "truth_agreement": sum(checked) / len(checked) if checked else None,
    "truth_pairs": len(checked),
  }


def _tell(log: Log, step: int, rows: Sequence[Row]) -> None:
  """Shares of the pairs judged so far."""
  found = rates(rows)
  metrics = {name: found[name] / max(found["asked"], 1) for name in judge.JUDGED}
  if found["truth_pairs"]:
    metrics["truth_agreement"] = found["truth_agreement"]
  log.metrics(step, metrics)
  log.progress(step, metrics, note=f"{len(rows)} prompts")


def _show(log: Log, summary: Mapping[str, Any]) -> None:
  share = lambda name: f"{summary[name] / max(summary['prompts'], 1):.1%}"
  log.table("What became of the pairs", [
    {"outcome": name.replace("_", " "), "pairs": summary[name], "of prompts": share(name)}
    for name in OUTCOMES])
  if summary["truth_pairs"]:
    log.note(
      f"label: {summary['truth_agreement']:.1%} of the {summary['truth_pairs']} kept "
      "pairs that truth can tell apart are as truth has them")
