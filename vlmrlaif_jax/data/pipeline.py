"""From files to what a stage reads: splits of examples, and the rows of each step."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core import jsonl
from vlmrlaif_jax.core.errors import check_at_least, user_errors
from vlmrlaif_jax.data import records, templates, tokenization
from vlmrlaif_jax.data.records import Example, Record, SkippedRecord
from vlmrlaif_jax.data.world import builder


class Splits(NamedTuple):
  """What a run learns from, is asked, and is measured on."""

  sft: Sequence[Example] = ()
  prompts: Sequence[Example] = ()
  benchmark: Sequence[Example] = ()
  shifted: Sequence[Example] = ()  # Another benchmark, of videos unlike all others.


def default_config() -> ConfigDict:
  return ConfigDict(
    dict(
      records="",  # A LLaVA-style .json or .jsonl file; "": the embedded world.
      videos="",  # The folder that the videos in it are relative to.
      prompts="",  # Records to sample answers to; "": the questions of `records`.
      benchmark="",  # Records to measure on; "": a held-out share of `records`.
      holdout=0.1,  # That share.
      # Videos of the embedded world.
      sizes=dict(sft=500, prompts=500, benchmark=260, shifted=0),
      prompt_len=placeholder(int),  # Tokens, video included.
      response_len=placeholder(int),  # Tokens, end included.
      workers=2,  # Processes that decode videos; 0 decodes in this one.
      timeout_s=60.0,  # For one video.
      features="",  # A folder of features that runs share; "": of the workdir alone.
      features_memory_gb=8.0,  # Features held in memory; the rest is on disk.
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `data`.

  Raises:
    UserError: a value is wrong.
  """
  with user_errors("data"):
    check_at_least(config, {"prompt_len": 1, "response_len": 1, "workers": 0})
    check_at_least(config, {"timeout_s": 0, "features_memory_gb": 0})
    if not 0 <= config.holdout < 1:
      raise ValueError(f"holdout must be from 0 to below 1, not {config.holdout}")


def load_splits(
  config: ConfigDict, folder: pathlib.Path, *, seed: int
) -> tuple[Splits, list[SkippedRecord]]:
  """Returns the splits that a config describes, and the records that were left out.

  Args:
    config: the section `data`.
    folder: where the embedded world is rendered, if it is that.
    seed: seeds the embedded world and what is held out.

  Raises:
    FileNotFoundError: a file or folder that the config names is not there.
    ValueError: no usable record is left.
  """
  if not config.records:
    return _embedded(config, folder, seed)
  sft, problems = _read(config.records, config.videos, need_answer=True)
  if config.benchmark:
    benchmark, more = _measurable(
      *_read(config.benchmark, config.videos, need_answer=False)
    )
    problems += more
  else:
    sft, benchmark = split_held_out(sft, config.holdout, seed)
  prompts = sft
  if config.prompts:
    prompts, more = _read(config.prompts, config.videos, need_answer=False)
    problems += more
  return Splits(sft, prompts, benchmark), problems


def _embedded(config, folder, seed) -> tuple[Splits, list[SkippedRecord]]:
  """The embedded world's splits, each beside its videos as a user's would be."""
  sizes = {name: count for name, count in config.sizes.items() if count}
  builder.build_world(folder, sizes=sizes, seed=seed)
  splits: dict[str, list[Example]] = {}
  problems: list[SkippedRecord] = []
  for split in sizes:
    path = folder / f"{split}.jsonl"
    if not path.exists():
      rows = sorted(builder.read_split(folder, split), key=lambda row: row["id"])
      jsonl.write_records(path, rows)
    splits[split], bad = records.read_records(
      path, videos=folder / "videos", need_answer=split == "sft"
    )
    problems += bad
  return Splits(**splits), problems


def _read(path, videos, *, need_answer):
  examples, problems = records.read_records(
    path, videos=videos or None, need_answer=need_answer
  )
  if not examples:
    raise ValueError(
      f"no usable record in {path}:\n"
      + records.format_skipped_records(problems, total=len(problems))
    )
  return examples, problems


def _measurable(examples, problems):
  """(those that an answer or the truth is known of, problems of the others, too)."""
  known = [e for e in examples if e["answer"] or "truth" in e]
  reason = "it has no answer to measure by"
  unknown = [e["id"] for e in examples if not (e["answer"] or "truth" in e)]
  return known, problems + [SkippedRecord(name, reason) for name in unknown]


def split_held_out(
  examples: Sequence[Record], share: float, seed: int
) -> tuple[list[Record], list[Record]]:
  """(the rest, a share), split by video, so that no video stands on both sides."""
  names = sorted({str(e["video"]) for e in examples})
  count = max(round(len(names) * share), 1)
  held = set(np.random.default_rng([seed, 7]).permutation(names)[:count])
  return (
    [e for e in examples if str(e["video"]) not in held],
    [e for e in examples if str(e["video"]) in held],
  )


def split_curriculum(
  examples: Sequence[Example], *, short_share: float, threshold: int
) -> tuple[list[Example], list[Example]]:
  """(easy, hard): the longer its answer, the harder an example (2402.03746, 3.1).

  Args:
    short_share: of the examples that count as easy; used if threshold is 0.
    threshold: longest easy answer, in words; 0 to go by the share.
  """
  words = [len(e["answer"].split()) for e in examples]
  if not threshold:
    threshold = int(np.quantile(words, short_share, method="lower"))
  easy = [e for e, n in zip(examples, words, strict=True) if n <= threshold]
  hard = [e for e, n in zip(examples, words, strict=True) if n > threshold]
  return easy, hard or easy


def shuffled_row_indices(count: int, size: int, *, seed: int, step: int) -> np.ndarray:
  """Which of `count` rows stand in a step's batch: shuffled, epoch after epoch.

  A pure function of seed and step, so that a run resumes where it was killed.
  """
  if count < 1:
    raise ValueError("no records to make a batch of: give some")
  order = grain.MapDataset.source(np.arange(count)).seed(seed).shuffle().repeat()
  return np.array([order[step * size + i] for i in range(size)])


def tokenize_examples(
  examples: Sequence[Example],
  tokenizer: tokenization.PreTrainedTokenizerBase,
  template: tokenization.Template,
  *,
  video_tokens: int,
  prompt_len: int,
  response_len: int,
  answered: bool,
  names: tuple[str, str] = ("data.prompt_len", "data.response_len"),
) -> tuple[list[Example], tokenization.TokenRows, list[SkippedRecord]]:
  """(examples that fit, their rows, problems of those that do not).

  Args:
    names: the settings that the lengths are of.
    answered: whether the rows hold the answers, to learn them, or only the prompts,
      to go on from; response_len is 0 for the latter.
  """
  kept, encoded, problems = [], [], []
  for example in examples:
    asked = example["question"]
    turns: templates.Turns = [(asked, None)]
    if answered:
      turns = example.get("turns", [(asked, example["answer"])])
    row = tokenization.encode_conversation(
      tokenizer, template, turns, video_tokens=video_tokens
    )
    if tokenization.is_within_lengths(
      row, prompt_len=prompt_len, response_len=response_len
    ):
      kept.append(example)
      encoded.append(row)
    else:
      prompt, response, _ = tokenization.split_response(row)
      problems.append(
        SkippedRecord(
          example["id"],
          f"prompt of {len(prompt)} and answer of {len(response)} tokens, but "
          f"{names[0]} is {prompt_len} and {names[1]} {response_len}",
        )
      )
  rows = tokenization.pad_rows(
    encoded,
    prompt_len=prompt_len,
    response_len=response_len,
    pad=tokenizer.pad_token_id,
  )
  return kept, rows, problems
