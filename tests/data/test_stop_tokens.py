"""Tokens that end a response, and settings of generation that are not used."""

import json

import pytest

from tests.helpers import qwen
from vlmrlaif_jax.data import stop_tokens, tokenization

TEMPLATE = tokenization.get_template("chat_template")


@pytest.fixture(scope="module")
def known():
  """(the tokenizer, <|im_end|>, <|endoftext|>)."""
  tokenizer = qwen.make_tokenizer()
  names = ["<|im_end|>", "<|endoftext|>"]
  return tokenizer, *tokenizer.convert_tokens_to_ids(names)


def write(folder, name="generation_config", **values):
  (folder / f"{name}.json").write_text(json.dumps(values))


def test_the_template_s_own_end_is_first_and_none_is_twice(known, tmp_path):
  tokenizer, end, text_end = known
  read = lambda: stop_tokens.read_stops(tmp_path, tokenizer, TEMPLATE)
  assert read() == (end,)
  write(tmp_path, "config", eos_token_id=None, text_config={"eos_token_id": text_end})
  assert read() == (end, text_end)
  write(tmp_path, "config", eos_token_id=end, text_config={"eos_token_id": text_end})
  assert read() == (end,)
  write(tmp_path, eos_token_id=[text_end, end])
  assert read() == (end, text_end)
  assert stop_tokens.describe_generation(tmp_path, tokenizer) == []


def test_ids_that_a_text_may_have_end_nothing_and_are_told(known, tmp_path):
  tokenizer, end, text_end = known
  write(tmp_path, eos_token_id=[text_end, 5, 10**6, -1])
  assert stop_tokens.read_stops(tmp_path, tokenizer, TEMPLATE) == (end, text_end)
  (line,) = stop_tokens.describe_generation(tmp_path, tokenizer)
  assert line.startswith("generation_config.json: eos_token_id [5, 1000000, -1] is not")


@pytest.mark.parametrize("value", ["2", [[2]], True, 2.0, {"id": 2}])
def test_what_is_no_id_is_an_error_that_names_the_file(known, tmp_path, value):
  write(tmp_path, eos_token_id=value)
  with pytest.raises(ValueError, match="generation_config.json: eos_token_id must be"):
    stop_tokens.read_stops(tmp_path, known[0], TEMPLATE)


def test_settings_that_change_greedy_answers_are_in_one_line(known, tmp_path):
  tokenizer, end, _ = known
  count = stop_tokens.count_sampled_ids(tokenizer, (end,))
  assert count == end + 1 < len(tokenizer)
  neutral = dict(repetition_penalty=1.0, num_beams=1, min_length=0, bad_words_ids=None)
  sampled = dict(do_sample=True, top_p=0.8, top_k=20, temperature=0.7)
  write(tmp_path, eos_token_id=end, suppress_tokens=[count, 400], **neutral, **sampled)
  assert stop_tokens.describe_generation(tmp_path, tokenizer) == []
  changed = dict(repetition_penalty=1.05, no_repeat_ngram_size=3, suppress_tokens=[7])
  write(tmp_path, eos_token_id=end, **changed)
  (line,) = stop_tokens.describe_generation(tmp_path, tokenizer)
  assert line.endswith(
    "no_repeat_ngram_size=3, repetition_penalty=1.05, suppress_tokens=[7]"
  )
