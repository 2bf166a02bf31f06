"""Ids of a published vocabulary: Qwen's, of 151,643 tokens, for texts that are hard.

Oracles: transformers' tokenizer and chat template, and byte-pair encoding by hand on
the published ranks.
"""

import itertools
import unicodedata

import pytest
import regex

from tests.data import tricky
from tests.data.tricky import (
  STRINGS,
  TALKS,
  answered,
  ids_where_nothing_typed_is_special,
  messages,
  ours,
  stripped,
  talks_of,
)
from tests.helpers import real_model
from vlmrlaif_jax.data import templates

pytestmark = pytest.mark.real_model

# The rule by which Qwen splits a text before it merges bytes, as published.
SPLIT = regex.compile(
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def ranks():
  return real_model.read_qwen_ranks()


@pytest.fixture(scope="module")
def bare(ranks):
  """The vocabulary without special tokens."""
  model = tricky.with_rules_of_qwen(real_model.make_bpe(ranks))
  assert model.get_vocab_size() == len(ranks) == 151_643
  return model


@pytest.fixture(scope="module")
def qwen(bare, tmp_path_factory):
  return tricky.qwen(tmp_path_factory.mktemp("vocabulary") / "qwen", bare)


def merge(piece, ranks):
  """Merges the neighbors of lowest rank until none are a token."""
  parts = [bytes([byte]) for byte in piece]
  while True:
    pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
    lowest = min(pairs, default=len(ranks))
    if lowest == len(ranks):
      return [ranks[part] for part in parts]
    at = pairs.index(lowest)
    parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_ids_are_those_of_merging_by_hand(ranks, bare):
  for said in STRINGS:
    text = unicodedata.normalize("NFC", said)
    pieces = SPLIT.findall(text)
    assert "".join(pieces) == text
    want = [i for piece in pieces for i in merge(piece.encode(), ranks)]
    assert bare.encode(said).ids == want


def test_conversations_have_the_ids_of_transformers(qwen):
  special = templates.get_special_tokens(qwen)
  ordinary = [s for s in STRINGS if not any(token in s for token in special)]
  talks = answered(talks_of(ordinary))
  assert len(talks) > 80
  for talk in talks:
    want = qwen.apply_chat_template(messages(stripped(talk)), return_dict=False)
    got = ours(qwen, "chat_template", talk, video_tokens=0).ids
    assert got == want[:-1]  # We end where a model would.
    assert qwen.decode(want[-1:]) == "\n"


def test_special_tokens_that_are_typed_are_plain_text(qwen, bare):
  """They are the exception: transformers would read them as special."""
  markers = templates.get_special_tokens(qwen)
  for talk in answered(TALKS):
    rendered = qwen.apply_chat_template(
      messages([("\ufdd5", "\ufdd6"), ("\ufdd7", "\ufdd8")]), tokenize=False
    ).removesuffix("\n")
    said = iter(words for turn in stripped(talk) for words in turn)
    parts = [
      (next(said), True) if "\ufdd5" <= part <= "\ufdd8" else (part, False)
      for part in regex.split("([\ufdd5-\ufdd8])", rendered)
    ]
    want = ids_where_nothing_typed_is_special(
      parts, markers, lambda run, first: bare.encode(run).ids
    )
    assert ours(qwen, "chat_template", talk, video_tokens=0).ids == want
