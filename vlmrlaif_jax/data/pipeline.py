"""Loading of data: splits of examples, and the tokenized rows of each step.

`load_splits` reads the user's files or renders the embedded world. `tokenize_examples`
converts examples to rows. `shuffled_row_indices` selects the rows of a step.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlmrlaif_jax.core.errors import UserError, check_at_least, user_errors
from vlmrlaif_jax.data import records, templates, tokenization
from vlmrlaif_jax.data.processors.interface import VideoTokens
from vlmrlaif_jax.data.records import Example, Record, SkippedRecord
from vlmrlaif_jax.data.templates import MEDIA_MARK
from vlmrlaif_jax.data.time_range import split_time_range
from vlmrlaif_jax.data.video import Media, MediaList, check_decoder, list_media


class Splits(NamedTuple):
  """The examples of a run by purpose."""

  sft: Sequence[Example] = ()  # Examples for supervised fine-tuning.
  prompts: Sequence[Example] = ()  # Prompts for RL.
  benchmark: Sequence[Example] = ()  # Examples for evaluation.
  shifted: Sequence[Example] = ()  # A benchmark of videos that look different.
  labels: Sequence[Example] = ()  # Prompts for labels, by default those for RL.


def default_config() -> ConfigDict:
  """Returns the defaults of the section `data`."""
  return ConfigDict(
    dict(
      records="",  # File of docs/data_formats.md; "" uses the embedded world.
      videos="",  # Folder of the videos that the records name.
      allow_outside=False,  # Whether trusted records may name files outside of it.
      prompts="",  # Records with prompts for RL; "" uses the questions of `records`.
      label_prompts="",  # Records with prompts for labels; "" uses those for RL.
      # Largest numbers of prompts, which are drawn at random; 0 for all.
      max_prompts=0,
      max_label_prompts=0,
      benchmark="",  # Records for evaluation; "" holds out a share of `records`.
      holdout=0.1,  # Share of `records` that is held out.
      # Videos of each split of the embedded world; labels=0 uses those of prompts.
      sizes=dict(sft=500, prompts=500, benchmark=260, shifted=0, labels=0),
      prompt_len=placeholder(int),  # Tokens of a prompt, including the video's.
      response_len=placeholder(int),  # Tokens of a response, including EOS.
      workers=2,  # Processes that decode videos; 0 decodes in the main process.
      timeout_s=60.0,  # Seconds to hash or to decode one video.
      decoder="pyav",  # Or "decord", for trusted MP4, MKV, WebM and AVI files.
      features="",  # Folder of features that runs share; "" is in the workdir.
      features_memory_gb=8.0,  # Largest size of features in memory, in GB.
    )
  )


def check(config: ConfigDict) -> None:
  """Checks the section `data`.

  Raises:
    UserError: A value is wrong.
  """
  with user_errors("data"):
    check_at_least(config, {"prompt_len": 1, "response_len": 1, "workers": 0})
    check_at_least(config, {"timeout_s": 0, "features_memory_gb": 0})
    check_at_least(config, {"max_prompts": 0, "max_label_prompts": 0})
    check_decoder(config.decoder)
    if not 0 <= config.holdout < 1:
      raise ValueError(f"holdout must be at least 0 and below 1, not {config.holdout}")


def load_splits(
  config: ConfigDict,
  folder: pathlib.Path,
  *,
  seed: int,
  written: pathlib.Path | None = None,
) -> tuple[Splits, list[SkippedRecord]]:
  """Returns the splits of a config, and the records that were skipped.

  Args:
    config: The section `data`.
    folder: Folder in which the embedded world is rendered, if `records` is "".
    seed: Seed of the embedded world and of the held-out examples.
    written: Folder to which images in the files are written; see read_records.

  Raises:
    FileNotFoundError: A file or folder of the config is missing.
    UserError: All records are held out, and none is left to train on.
    ValueError: A file has no usable record.
  """
  load = _load_files if config.records else _load_world
  splits, problems = load(config, folder, seed, written)
  labels = splits.labels or splits.prompts
  return splits._replace(
    prompts=_draw(splits.prompts, config.max_prompts, seed),
    labels=_draw(labels, config.max_label_prompts, seed),
  ), problems


def _draw(examples: Sequence[Example], most: int, seed: int) -> Sequence[Example]:
  """Returns a random selection of at most `most` examples, in their order; 0: all."""
  if not most or len(examples) <= most:
    return examples
  drawn = np.random.default_rng([seed, 8]).permutation(len(examples))[:most]
  return [examples[i] for i in sorted(drawn)]


def _load_files(config, folder, seed, written) -> tuple[Splits, list[SkippedRecord]]:
  read = functools.partial(
    _read,
    videos=config.videos or None,
    written=written,
    allow_outside=config.allow_outside,
  )
  sft, problems = read(config.records, need_answer=True)
  if config.benchmark:
    benchmark, more = _select_measurable(*read(config.benchmark, need_answer=False))
    if not benchmark:
      raise ValueError(
        f"no record of data.benchmark={config.benchmark} has an answer to compare "
        'responses with: give records with answers, or set data.benchmark="" to hold '
        "out a share of data.records"
      )
    problems += more
  else:
    sft, benchmark = split_for_training(sft, config.holdout, seed, "data.holdout")
  prompts = sft
  if config.prompts:
    prompts, more = read(config.prompts, need_answer=False)
    problems += more
  labels: Sequence[Example] = ()
  if config.label_prompts:
    labels, more = read(config.label_prompts, need_answer=False)
    problems += more
  parts = [keep_first_questions(part) for part in (prompts, labels, benchmark)]
  problems += [problem for _, others in parts for problem in others]
  prompts, labels, benchmark = (examples for examples, _ in parts)
  return Splits(sft, prompts, benchmark, labels=labels), problems


def keep_first_questions(
  examples: Sequence[Example],
) -> tuple[list[Example], list[SkippedRecord]]:
  """Returns examples without the videos and images of later turns.

  RL and evaluation use the first question of a conversation. Those whose first question
  has no video are skipped.
  """
  selected, problems = [], []
  for example in examples:
    first, *others = (question.count(MEDIA_MARK) for question, _ in example["turns"])
    if not any(others):
      selected.append(example)
      continue
    if not first:
      why = "its first question, which RL and evaluation use, has no video"
      problems.append(SkippedRecord(example["id"], why))
      continue
    paths = list_media(example["video"])[:first]
    video = MediaList(paths) if first > 1 else paths[0]
    own: Any = {"video": video, "turns": example["turns"][:1]}
    selected.append({**example, **own})
  return selected, problems


def _load_world(config, folder, seed, _) -> tuple[Splits, list[SkippedRecord]]:
  """Renders the embedded world, and reads its splits like a user's files."""
  # TFDS takes half a second to import, and only this world needs it.
  from vlmrlaif_jax.data.world import repair

  sizes = {name: count for name, count in config.sizes.items() if count}
  repair.load_world(folder, sizes=sizes, seed=seed)
  splits: dict[str, list[Example]] = {}
  problems: list[SkippedRecord] = []
  for split in sizes:
    path = folder / f"{split}.jsonl"
    splits[split], bad = records.read_records(
      path, videos=folder / "videos", need_answer=split == "sft"
    )
    problems += bad
  return Splits(**splits), problems


def _read(path, **settings):
  examples, problems = records.read_records(path, **settings)
  if not examples:
    reasons = records.format_skipped_records(problems, total=len(problems))
    raise ValueError(
      f"no usable record in {path}:\n"
      + (reasons if problems else "  the file is empty; give one with records")
    )
  return examples, problems


def _select_measurable(examples, problems):
  """Returns the examples with an answer or ground truth, and problems of the others."""
  known = [e for e in examples if e["answer"] or "truth" in e]
  reason = "it has no answer to compare responses with"
  unknown = [e["id"] for e in examples if not (e["answer"] or "truth" in e)]
  return known, problems + [SkippedRecord(name, reason) for name in unknown]


def split_held_out(
  examples: Sequence[Record], share: float, seed: int
) -> tuple[list[Record], list[Record]]:
  """Splits examples by video into (training, held out), so that no video is in both.

  Args:
    examples: Examples or preferences.
    share: Share of the videos that is held out; at least one video is.
    seed: Seed of the selection.
  """
  groups = _group_by_video(examples)
  names = sorted(set(groups))
  count = max(round(len(names) * share), 1)
  held_out = set(np.random.default_rng([seed, 7]).permutation(names)[:count])
  sides = [group in held_out for group in groups]
  return (
    [e for e, is_held_out in zip(examples, sides, strict=True) if not is_held_out],
    [e for e, is_held_out in zip(examples, sides, strict=True) if is_held_out],
  )


def _group_by_video(examples: Sequence[Record]) -> list[str]:
  """Returns the group of each example: the name of a video.

  Parts of one video, and examples that share one of several videos, are in one group.
  """
  get_name = lambda video: split_time_range(str(video)).path
  named = [list(map(get_name, list_media(e["video"]))) for e in examples]
  parents = {name: name for names in named for name in names}

  def find(name: str) -> str:
    while parents[name] != name:
      parents[name] = name = parents[parents[name]]
    return name

  for first, *others in named:
    for other in others:
      least, greatest = sorted((find(first), find(other)))
      parents[greatest] = least
  return [find(names[0]) for names in named]


def split_for_training(
  examples: Sequence[Record], share: float, seed: int, setting: str
) -> tuple[list[Record], list[Record]]:
  """Splits examples as `split_held_out`, and requires one to train on.

  Args:
    examples: Examples or preferences.
    share: Share of the videos that is held out.
    seed: Seed of the selection.
    setting: Setting of the share.

  Raises:
    UserError: All examples are held out.
  """
  rest, held_out = split_held_out(examples, share, seed)
  if not rest:
    videos = len(set(_group_by_video(examples)))
    raise UserError(
      f"{setting}={share} leaves no record to train on: at least one video is held "
      f"out, and the {len(examples)} records are about {videos}. Give records about "
      f"more videos{', or lower the share' if videos > 1 else ''}"
      + (", or set data.benchmark" if setting == "data.holdout" else "")
    )
  return rest, held_out


def split_curriculum(
  examples: Sequence[Example], *, short_share: float, threshold: int
) -> tuple[list[Example], list[Example]]:
  """Splits examples by answer length into (easy, hard) (2402.03746, section 3.1).

  Args:
    examples: Examples with answers.
    short_share: Share of the examples that are easy. Only used if `threshold` is 0.
    threshold: Longest easy answer in words; 0 uses `short_share`.

  Raises:
    UserError: There is no example, or no easy one.
  """
  if not examples:
    raise UserError("no record is left to train on: give data.records with answers")
  words = [len(e["answer"].split()) for e in examples]
  if not threshold:
    threshold = int(np.quantile(words, short_share, method="lower"))
  easy = [e for e, n in zip(examples, words, strict=True) if n <= threshold]
  hard = [e for e, n in zip(examples, words, strict=True) if n > threshold]
  if not easy:
    raise UserError(
      f"sft.threshold={threshold} leaves no short answer to train on: the shortest of "
      f"{len(words)} answers has {min(words)} words. Raise sft.threshold, or set it to "
      "0 to use sft.short_share"
    )
  return easy, hard or easy


def shuffled_row_indices(count: int, size: int, *, seed: int, step: int) -> np.ndarray:
  """Returns the indices of the rows in a step's batch, shuffled in every epoch.

  The result depends only on the arguments, so that a resumed run reads the same rows.

  Args:
    count: Rows of the data set.
    size: Rows of a batch.
    seed: Seed of the shuffling.
    step: Step, from 0.
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
  lay_out: Callable[[Media], VideoTokens],
  prompt_len: int,
  response_len: int,
  answered: bool,
  names: tuple[str, str] = ("data.prompt_len", "data.response_len"),
) -> tuple[list[Example], tokenization.TokenRows, list[SkippedRecord]]:
  """Tokenizes examples and skips those that are too long.

  Args:
    examples: Examples to tokenize.
    tokenizer: Tokenizer of the model.
    template: Conversation template.
    lay_out: Returns the texts and positions of a conversation's videos and images.
    prompt_len: Largest number of tokens of a prompt.
    response_len: Largest number of tokens of a response.
    answered: True for rows with answers, to train on. False for prompts only, with a
      response_len of 0.
    names: Settings of both lengths, for the reasons of skipped records.

  Returns:
    The examples that fit, their rows, and the skipped records.
  """
  fitting, encoded, problems = [], [], []
  lengths: dict[str, Any] = {"prompt_len": prompt_len, "response_len": response_len}
  for example in examples:
    question = example["question"]
    turns: templates.Turns = [(question, None)]
    if answered:
      turns = example.get("turns", [(question, example["answer"])])
    row = tokenization.encode_conversation(
      tokenizer,
      template,
      turns,
      video=lay_out(example["video"]),
      loss=example.get("loss") if answered else None,
    )
    if tokenization.is_within_lengths(row, **lengths):
      fitting.append(example)
      encoded.append(row)
    else:
      prompt, response, _ = tokenization.split_response(row)
      why = (
        f"prompt of {len(prompt)} and answer of {len(response)} tokens, but "
        f"{names[0]} is {prompt_len} and {names[1]} {response_len}"
      )
      problems.append(SkippedRecord(example["id"], why))
  rows = tokenization.pad_rows(encoded, **lengths, pad=tokenizer.pad_token_id)
  return fitting, rows, problems
