"""Reads which tokens end a response, from the generation settings of a checkpoint.

The settings are those of generation_config.json, or of config.json without such a file,
as in transformers. Only `eos_token_id` is used. A response ends with any of its ids, or
with the end token of the conversation template, on which SFT trains.
"""

import pathlib
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from vlmrlaif_jax.core.files import read_json
from vlmrlaif_jax.core.types import Stops
from vlmrlaif_jax.data import templates, tokenization

# Settings that change greedy decoding -> the value that disables each, as null does.
# The list is that of transformers' `_get_logits_processor` and stopping criteria.
_CHANGES_GREEDY: dict[str, Any] = {
  "bad_words_ids": [],
  "begin_suppress_tokens": [],
  "encoder_no_repeat_ngram_size": 0,
  "encoder_repetition_penalty": 1,
  "exponential_decay_length_penalty": None,
  "forced_bos_token_id": None,
  "forced_eos_token_id": None,
  "guidance_scale": 1,
  "min_length": 0,
  "min_new_tokens": 0,
  "no_repeat_ngram_size": 0,
  "num_beams": 1,
  "repetition_penalty": 1,
  "sequence_bias": {},
  "stop_strings": [],
  "suppress_tokens": [],
  "watermarking_config": None,
}


class _GenerationSettings(NamedTuple):
  """The generation settings of a checkpoint."""

  file: pathlib.Path  # The file that has them; it may not exist.
  values: dict[str, Any]
  stops: list[int]  # Ids of `eos_token_id`.


def read_stops(
  folder: pathlib.Path,
  tokenizer: PreTrainedTokenizerBase,
  template: tokenization.Template,
) -> Stops:
  """Returns the ids of the tokens that end a response, the template's own first.

  Ids that are no special token of the tokenizer are left out, because a text may
  contain them. `describe_generation` lists them.

  Args:
    folder: Folder of the settings.
    tokenizer: The tokenizer.
    template: Conversation template.

  Raises:
    ValueError: The template's end is no special token, or `eos_token_id` has another
      type than an id or a list of ids.
  """
  own = tokenization.find_eos_id(tokenizer, template)
  special = templates.get_special_tokens(tokenizer).values()
  more = [stop for stop in _read_settings(folder).stops if stop in special]
  return tuple(dict.fromkeys([own, *more]))


def count_sampled_ids(tokenizer: PreTrainedTokenizerBase, stops: Stops) -> int:
  """Returns how many ids may be sampled; all others have higher numbers.

  They exclude the special tokens at the end of the vocabulary, after all EOS tokens.
  """
  vocab = len(tokenizer)
  added = [i for i in tokenizer.added_tokens_decoder if i > max(stops)]
  while vocab - 1 in added:
    vocab -= 1
  return vocab


def describe_generation(
  folder: pathlib.Path, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
  """Returns notes about generation settings that are not used.

  Args:
    folder: Folder of the settings.
    tokenizer: The tokenizer.

  Raises:
    ValueError: `eos_token_id` has another type than an id or a list of ids.
  """
  file, values, stops = _read_settings(folder)
  special = templates.get_special_tokens(tokenizer).values()
  known = [stop for stop in stops if stop in special]
  notes = []
  if unknown := [stop for stop in stops if stop not in special]:
    notes.append(
      f"{file.name}: eos_token_id {unknown} is not used, because it is no special "
      "token of the tokenizer"
    )
  used = {key: values[key] for key in _CHANGES_GREEDY if key in values}
  if known and isinstance(ids := used.get("suppress_tokens"), list):
    # Exports list the ids that are never sampled.
    count = count_sampled_ids(tokenizer, tuple(known))
    used["suppress_tokens"] = [i for i in ids if i < count]
  changes = [
    f"{key}={str(value)[:60]}"
    for key, value in used.items()
    if value is not None and value != _CHANGES_GREEDY[key]
  ]
  if changes:
    notes.append(
      f"{file.name}: settings that are not used, although they change greedy "
      f"answers in transformers: {', '.join(changes)}"
    )
  return notes


def _read_settings(folder: pathlib.Path) -> _GenerationSettings:
  """Reads the generation settings of a checkpoint, empty without files."""
  file = folder / "generation_config.json"
  if not file.exists():
    file = folder / "config.json"
  values = read_json(file, default={})
  if not isinstance(values, dict):
    raise ValueError(
      f"{file} must contain a JSON object, got {type(values).__name__}. Download it "
      "again."
    )
  text = values.get("text_config")
  if isinstance(text, dict):  # Nested settings apply where the outer ones are unset.
    outer = {key: value for key, value in values.items() if value is not None}
    values = {**text, **outer}
  stops = values.get("eos_token_id")
  ids = [] if stops is None else stops if isinstance(stops, list) else [stops]
  if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
    raise ValueError(
      f"{file}: eos_token_id must be an id or a list of ids, got {stops!r}. Correct "
      "the value."
    )
  return _GenerationSettings(file, values, ids)
