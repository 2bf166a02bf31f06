"""Token ids, masks and padding, with a tokenizer whose every token can be named."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmrlaif_jax.data import text
from vlmrlaif_jax.data.text import Encoded
from vlmrlaif_jax.types import VIDEO_TOKEN

V = VIDEO_TOKEN
WORDS = ["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "what", "is", "it", "a", "ring",
         "and", "then", "stops"]  # fmt: skip
ID = {word: i for i, word in enumerate(WORDS)}
BRIEF = text.TEMPLATES["brief"]


@pytest.fixture(scope="module")
def words():
  """One token a word."""
  model = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return PreTrainedTokenizerFast(
    tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    pad_token="<unk>",
  )  # fmt: skip


def ids(said):
  return [V if word == "V" else ID[word] for word in said.split()]


def learned(encoded):
  return [i for i, learn in zip(encoded.ids, encoded.learn, strict=True) if learn]


def test_answer_and_its_end_are_learned(words):
  found = text.encode(words, BRIEF, [("what is it", "a ring")], video_tokens=2)
  assert found.ids == ids("<s> USER: V V what is it ASSISTANT: a ring </s>")
  assert found.learn == [False] * 8 + [True] * 3


def test_every_answer_is_learned_and_no_question(words):
  turns = [("what is it", "a ring"), ("and then", "it stops")]
  found = text.encode(words, BRIEF, turns, video_tokens=1)
  assert found.ids == ids(
    "<s> USER: V what is it ASSISTANT: a ring </s> "
    "USER: and then ASSISTANT: it stops </s>"
  )
  assert learned(found) == ids("a ring </s> it stops </s>")


def test_question_that_repeats_the_answer_is_not_learned(words):
  found = text.encode(words, BRIEF, [("a ring", "a ring")], video_tokens=1)
  assert found.learn == [False] * 6 + [True] * 3


def test_open_conversation_ends_where_the_model_goes_on(words):
  turns = [("what is it", "a ring"), ("and then", None)]
  found = text.encode(words, BRIEF, turns, video_tokens=1)
  assert found.ids[-3:] == ids("and then ASSISTANT:")
  assert learned(found) == ids("a ring </s>")


@pytest.mark.parametrize("template", text.TEMPLATES.values(), ids=text.TEMPLATES)
@pytest.mark.parametrize("answer", ["The ring is red.", "猫", "xyz"])
def test_what_is_learned_goes_on_from_the_prompt(tok, template, answer):
  """Also where the space before an answer is a token of its own."""
  prompt = text.encode(tok, template, [("What is it?", None)], video_tokens=3)
  whole = text.encode(tok, template, [("What is it?", answer)], video_tokens=3)
  assert whole.ids[: len(prompt.ids)] == prompt.ids
  assert not any(whole.learn[: len(prompt.ids)])
  assert all(whole.learn[len(prompt.ids) :])


def test_text_alone_has_no_video_and_no_line_for_it(words):
  found = text.encode(words, BRIEF, [("what is it", "a ring")], video_tokens=0)
  assert found.ids == ids("<s> USER: what is it ASSISTANT: a ring </s>")


def test_video_in_a_question_is_plain_text(tok):
  found = text.encode(tok, BRIEF, [("Is <video> it?", None)], video_tokens=3)
  assert found.ids.count(V) == 3
  assert "<video>" in tok.decode([i for i in found.ids if i != V])


@pytest.mark.parametrize("answer", ["The ring is red.", "猫が二匹。", "naïve 🙂 π"])
def test_what_is_learned_spells_the_answer(tok, answer):
  """Also where a letter is several tokens of one byte each."""
  found = text.encode(tok, BRIEF, [("What is it?", answer)], video_tokens=3)
  assert tok.decode(learned(found)).strip() == f"{answer}</s>"


@pytest.mark.parametrize("name", text.TEMPLATES)
def test_template_is_written_out(tok, name):
  template = text.template_named(name)
  found = text.encode(tok, template, [("What?", "A."), ("And?", "B.")], video_tokens=1)
  after = found.ids[found.ids.index(V) + 1 :]
  assert tok.decode(found.ids[1 : found.ids.index(V)]) == template.system + "USER: "
  assert tok.decode(after) == ("\nWhat? ASSISTANT: A.</s>USER: And? ASSISTANT: B.</s>")


PROMPT_ONLY = Encoded([1, V, 5], [False] * 3)
SHORT = Encoded([1, V, 5, 6, 2], [False] * 3 + [True] * 2)
TWO_TURNS = Encoded(
  [1, 5, 6, 2, 7, 8, 2], [False, False, True, True, False, True, True]
)


def test_padding_is_outside_and_responses_begin_at_one_index():
  rows = text.pad_rows(
    [SHORT, TWO_TURNS, PROMPT_ONLY], prompt_len=4, response_len=6, pad=0
  )
  np.testing.assert_array_equal(
    rows.tokens,
    [
      [0, 1, V, 5, 6, 2, 0, 0, 0, 0],
      [0, 0, 1, 5, 6, 2, 7, 8, 2, 0],
      [0, 1, V, 5, 0, 0, 0, 0, 0, 0],
    ],
  )
  np.testing.assert_array_equal(rows.mask.sum(1), [5, 7, 3])
  np.testing.assert_array_equal(
    rows.loss_mask.astype(int),
    [
      [0, 0, 0, 0, 1, 1, 0, 0, 0, 0],
      [0, 0, 0, 0, 1, 1, 0, 1, 1, 0],
      [0] * 10,
    ],
  )


def test_mask_is_true_of_tokens_that_look_like_padding():
  rows = text.pad_rows(
    [Encoded([1, 0, 2], [False, False, True])], prompt_len=3, response_len=2, pad=0
  )
  np.testing.assert_array_equal(rows.mask, [[False, True, True, True, False]])


@pytest.mark.parametrize("prompt_len, response_len", [(2, 2), (3, 1)])
def test_what_is_too_long_is_an_error_that_names_the_lengths(prompt_len, response_len):
  lengths = dict(prompt_len=prompt_len, response_len=response_len)
  assert not text.fits(SHORT, **lengths)
  said = f"row 1: prompt of 3 .* 2 .*prompt_len={prompt_len}"
  with pytest.raises(text.TooLong, match=said):
    text.pad_rows([Encoded([1], [False]), SHORT], **lengths, pad=0)


def test_what_just_fits_fits():
  assert text.fits(SHORT, prompt_len=3, response_len=2)
  text.pad_rows([SHORT], prompt_len=3, response_len=2, pad=0)


def test_response_text_is_without_special_tokens(words):
  row = ids("USER: what ASSISTANT: a ring </s>")
  keep = [False] * 3 + [True] * 3
  found = text.responses_text(words, np.array([row]), np.array([keep]))
  assert found == ["a ring"]


def test_suffix_goes_on_after_an_answer(words):
  said = "USER: what ASSISTANT:"
  assert text.suffix_ids(words, said) == ids(said)


@pytest.mark.parametrize("length, found", [(1, 8), (8, 8), (9, 16), (0, 0)])
def test_bucket(length, found):
  assert text.bucket(length, multiple=8) == found


def test_unknown_template_is_an_error_that_names_the_known():
  with pytest.raises(ValueError, match="'brief', 'vicuna_v1'.*not 'llama'"):
    text.template_named("llama")


def test_missing_tokenizer_is_an_error_that_names_the_folder(tmp_path):
  with pytest.raises(FileNotFoundError, match="no_such"):
    text.load_tokenizer(tmp_path / "no_such")


def test_saved_tokenizer_reads_the_same(tok, tmp_path):
  tok.save_pretrained(tmp_path)
  said = "The small red ring moves left, 猫."
  loaded = text.load_tokenizer(tmp_path)
  assert loaded(said)["input_ids"] == tok(said)["input_ids"]
  assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (
    "<s>", "</s>", "<unk>",
  )  # fmt: skip
