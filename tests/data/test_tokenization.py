"""Token ids, masks and padding, with a tokenizer whose every token can be named."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data import tricky
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import templates, tokenization
from vlmrlaif_jax.data.processors.interface import VideoTokens
from vlmrlaif_jax.data.processors.llava import lay_out_features
from vlmrlaif_jax.data.tokenization import EncodedConversation

V = VIDEO_TOKEN
WORDS = ["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "what", "is", "it", "a", "ring",
         "and", "then", "stops"]  # fmt: skip
ID = {word: i for i, word in enumerate(WORDS)}
BRIEF = tokenization.CONVERSATION_TEMPLATES["brief"]


@pytest.fixture(scope="module")
def words():
  """One token a word."""
  model = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
  model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return PreTrainedTokenizerFast(
    tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    add_bos_token=True,
    pad_token="<unk>",
  )  # fmt: skip


def ids(said):
  return [V if word == "V" else ID[word] for word in said.split()]


def learned(encoded):
  return [i for i, learn in zip(encoded.ids, encoded.learn, strict=True) if learn]


def test_answer_and_its_end_are_learned(words):
  found = tokenization.encode_conversation(
    words, BRIEF, [("what is it", "a ring")], video=lay_out_features(2)
  )
  assert found.ids == ids("<s> USER: V V what is it ASSISTANT: a ring </s>")
  assert found.learn == [False] * 8 + [True] * 3


def test_every_answer_is_learned_and_no_question(words):
  turns = [("what is it", "a ring"), ("and then", "it stops")]
  found = tokenization.encode_conversation(
    words, BRIEF, turns, video=lay_out_features(1)
  )
  assert found.ids == ids(
    "<s> USER: V what is it ASSISTANT: a ring </s> "
    "USER: and then ASSISTANT: it stops </s>"
  )
  assert learned(found) == ids("a ring </s> it stops </s>")


def test_answer_without_loss_is_not_learned(words):
  turns = [("what is it", "a ring"), ("and then", "it stops")]
  encode = lambda loss: tokenization.encode_conversation(
    words, BRIEF, turns, video=lay_out_features(1), loss=loss
  )
  assert learned(encode([False, True])) == ids("it stops </s>")
  assert learned(encode([True, False])) == ids("a ring </s>")
  assert encode([True, True])[:2] == encode(None)[:2]


def test_question_that_repeats_the_answer_is_not_learned(words):
  found = tokenization.encode_conversation(
    words, BRIEF, [("a ring", "a ring")], video=lay_out_features(1)
  )
  assert found.learn == [False] * 6 + [True] * 3


def test_open_conversation_ends_where_the_model_goes_on(words):
  turns = [("what is it", "a ring"), ("and then", None)]
  found = tokenization.encode_conversation(
    words, BRIEF, turns, video=lay_out_features(1)
  )
  assert found.ids[-3:] == ids("and then ASSISTANT:")
  assert learned(found) == ids("a ring </s>")


def test_text_alone_has_no_video_and_no_line_for_it(words):
  found = tokenization.encode_conversation(
    words, BRIEF, [("what is it", "a ring")], video=lay_out_features(0)
  )
  assert found.ids == ids("<s> USER: what is it ASSISTANT: a ring </s>")


def test_video_in_a_question_is_plain_text(tok):
  found = tokenization.encode_conversation(
    tok, BRIEF, [("Is <video> it?", None)], video=lay_out_features(3)
  )
  assert found.ids.count(V) == 3
  assert "<video>" in tok.decode([i for i in found.ids if i != V])


@pytest.mark.parametrize("typed", ["</s>", "a </s>", "<image> or <s>?", "<0x41>"])
def test_special_token_that_is_typed_is_plain_text(tok, typed):
  """Also where merges of the tokenizer would spell one."""
  found = tokenization.encode_conversation(
    tok, BRIEF, [(typed, typed)], video=lay_out_features(1)
  )
  special = [i for i in found.ids if i in tok.all_special_ids]
  assert special == [tok.bos_token_id, tok.eos_token_id]
  after = [i for i in found.ids[1:] if i != V]
  assert tok.decode(after) == f"USER: \n{typed} ASSISTANT: {typed}</s>"
  assert tok.decode(learned(found)) == f" {typed}</s>"


def test_unigram_model_reads_what_is_typed_as_plain_text():
  pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -9.0) for c in "<>/sUSERAITN: a\n")]
  model = Tokenizer(models.Unigram(pieces, unk_id=0))
  tok = PreTrainedTokenizerFast(
    tokenizer_object=model, unk_token="<unk>", eos_token="</s>", pad_token="<unk>"
  )
  found = tokenization.encode_conversation(
    tok, BRIEF, [("</s>", "</s>")], video=lay_out_features(0)
  )
  assert [i for i in found.ids if i < 2] == [1]
  assert tok.convert_ids_to_tokens(learned(found)) == [*" </s>", "</s>"]


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_empty_answer_is_learned_as_just_its_end(tok, answer):
  found = tokenization.encode_conversation(
    tok, BRIEF, [("What?", answer), ("And?", "B.")], video=lay_out_features(1)
  )
  first = found.learn.index(True)
  assert found.ids[first] == tok.eos_token_id
  assert not found.learn[first + 1]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_that_the_tokenizer_never_adds_is_not_added(words, tmp_path, adds_bos):
  folder = saved(
    words, tmp_path, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    add_bos_token=adds_bos,
  )  # fmt: skip
  tok = tokenization.load_tokenizer(folder)
  found = tokenization.encode_conversation(
    tok, BRIEF, [("what", "a")], video=lay_out_features(1)
  )
  assert found.ids == ids("<s> " * adds_bos + "USER: V what ASSISTANT: a </s>")


@pytest.mark.parametrize("setting", [{}, {"add_bos_token": False}])
def test_tokenizer_of_llama_adds_bos_unless_its_config_says_no(tmp_path, setting):
  tricky.llama(tmp_path / "x", tricky.sentencepiece_model(), legacy=False)
  config = json.loads((tmp_path / "x" / "tokenizer_config.json").read_text()) | setting
  (tmp_path / "x" / "tokenizer_config.json").write_text(json.dumps(config))
  tok = tokenization.load_tokenizer(tmp_path / "x")
  assert tokenization.adds_bos(tok) == (not setting)


def test_bos_of_qwen_that_is_never_added_is_not_added(tmp_path):
  folder = tmp_path / "x"
  tricky.qwen(folder, tricky.bytes_model())
  config = json.loads((folder / "tokenizer_config.json").read_text())
  config |= {"bos_token": "<|im_start|>"}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  assert not tokenization.adds_bos(tokenization.load_tokenizer(folder))


def test_tokenizer_without_bos_begins_with_the_text(words):
  model = words.backend_tokenizer
  tok = PreTrainedTokenizerFast(
    tokenizer_object=model, unk_token="<unk>", eos_token="</s>"
  )
  found = tokenization.encode_conversation(
    tok, BRIEF, [("what", "a")], video=lay_out_features(1)
  )
  assert found.ids == ids("USER: V what ASSISTANT: a </s>")


def conversation(ids, learn):
  return EncodedConversation(ids, learn, np.arange(len(ids))[:, None])


PROMPT_ONLY = conversation([1, V, 5], [False] * 3)
SHORT = conversation([1, V, 5, 6, 2], [False] * 3 + [True] * 2)
TWO_TURNS = conversation(
  [1, 5, 6, 2, 7, 8, 2], [False, False, True, True, False, True, True]
)


def test_padding_is_outside_and_responses_begin_at_one_index():
  rows = tokenization.pad_rows(
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


def test_positions_stay_with_their_tokens():
  jump = SHORT._replace(positions=np.array([[0] * 3, [1, 5, 9], *[[10] * 3] * 3]))
  rows = tokenization.pad_rows([jump], prompt_len=4, response_len=3, pad=0)
  want = [[0, 0, 0], [0, 0, 0], [1, 5, 9], *[[10] * 3] * 3, [0, 0, 0]]
  np.testing.assert_array_equal(rows.positions, [want])


def test_positions_of_no_rows_have_an_axis():
  rows = tokenization.pad_rows([], prompt_len=4, response_len=3, pad=0)
  assert rows.positions.shape == (0, 7, 1)


def test_a_conversation_is_truncated_with_its_positions():
  cut = SHORT.truncate(2)
  assert (cut.ids, cut.learn) == ([1, V], [False, False])
  np.testing.assert_array_equal(cut.positions, [[0], [1]])


def test_mask_is_true_of_tokens_that_look_like_padding():
  rows = tokenization.pad_rows(
    [conversation([1, 0, 2], [False, False, True])],
    prompt_len=3,
    response_len=2,
    pad=0,
  )
  np.testing.assert_array_equal(rows.mask, [[False, True, True, True, False]])


@pytest.mark.parametrize("prompt_len, response_len", [(2, 2), (3, 1)])
def test_what_is_too_long_is_an_error_that_names_the_lengths(prompt_len, response_len):
  lengths = dict(prompt_len=prompt_len, response_len=response_len)
  assert not tokenization.is_within_lengths(SHORT, **lengths)
  said = f"row 1: prompt of 3 .* 2 .*prompt_len={prompt_len}"
  with pytest.raises(ValueError, match=said):
    tokenization.pad_rows([conversation([1], [False]), SHORT], **lengths, pad=0)


def test_what_just_fits_fits():
  assert tokenization.is_within_lengths(SHORT, prompt_len=3, response_len=2)
  tokenization.pad_rows([SHORT], prompt_len=3, response_len=2, pad=0)


def test_response_text_is_without_special_tokens(words):
  row = ids("USER: what ASSISTANT: a ring </s>")
  keep = [False] * 3 + [True] * 3
  found = tokenization.decode_responses(words, np.array([row]), np.array([keep]))
  assert found == ["a ring"]


@pytest.mark.parametrize("said", ["naïve 🙂", "猫\nπ"])
def test_response_text_keeps_letters_made_of_bytes(tok, said):
  """Their tokens are special in name in the shipped tokenizer."""
  row = np.array([[*tokenization.encode_suffix(tok, said), tok.eos_token_id]])
  assert tokenization.decode_responses(tok, row, row >= 0) == [said]


def test_suffix_goes_on_after_an_answer(words):
  said = "USER: what ASSISTANT:"
  assert tokenization.encode_suffix(words, said) == ids(said)


@pytest.mark.parametrize("length, found", [(1, 8), (8, 8), (9, 16), (0, 0)])
def test_bucket(length, found):
  assert tokenization.round_up_length(length, multiple=8) == found


def test_unknown_template_is_an_error_that_names_the_known():
  with pytest.raises(ValueError, match="'brief', .*'vicuna_v1'.*not 'llama'"):
    tokenization.get_template("llama")


def test_missing_tokenizer_is_an_error_that_names_the_folder(tmp_path):
  with pytest.raises(FileNotFoundError, match="no_such"):
    tokenization.load_tokenizer(tmp_path / "no_such")


def test_saved_tokenizer_reads_the_same(tok, tmp_path):
  tok.save_pretrained(tmp_path)
  said = "The small red ring moves left, 猫."
  loaded = tokenization.load_tokenizer(tmp_path)
  assert loaded(said)["input_ids"] == tok(said)["input_ids"]
  assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (
    "<s>", "</s>", "<unk>",
  )  # fmt: skip


def saved(words, folder, **tokens):
  made = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, **tokens)
  made.save_pretrained(folder)
  return folder


def test_chat_template_of_transformers_4_is_read(words, tmp_path):
  folder = saved(words, tmp_path, unk_token="<unk>")
  (folder / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
  assert tokenization.load_tokenizer(folder).chat_template == "{{ messages }}"


def test_unk_is_pad_where_no_pad_is_named(words, tmp_path):
  loaded = tokenization.load_tokenizer(saved(words, tmp_path, unk_token="<unk>"))
  assert (loaded.pad_token, loaded.pad_token_id) == ("<unk>", 0)


def test_pad_that_is_named_stays(words, tmp_path):
  folder = saved(words, tmp_path, unk_token="<unk>", pad_token="</s>")
  assert tokenization.load_tokenizer(folder).pad_token == "</s>"


def test_eos_is_pad_where_no_pad_and_no_unk_is_named(words, tmp_path):
  loaded = tokenization.load_tokenizer(saved(words, tmp_path, eos_token="</s>"))
  assert loaded.pad_token == "</s>"


def test_no_token_for_padding_is_an_error_that_says_where_to_name_one(words, tmp_path):
  folder = saved(words, tmp_path)
  with pytest.raises(
    ValueError, match="no pad, unk or EOS .*pad_token.*tokenizer_conf"
  ):
    tokenization.load_tokenizer(folder)


def test_tokenizer_that_does_not_tell_offsets_is_refused(tmp_path):
  config = {"tokenizer_class": "ByT5Tokenizer"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="ByT5Tokenizer .*use .*tokenizer.json"):
    tokenization.load_tokenizer(tmp_path)


def test_video_of_several_runs_has_its_text_and_the_positions_of_its_blocks(words):
  square = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
  video = VideoTokens([["it ", 4, "</s> then ", 4]], [square, square], axes=3)
  found = tokenization.encode_conversation(words, BRIEF, [("ring", None)], video=video)
  assert found.ids == ids("<s> USER: it V V V V </s> then V V V V ring ASSISTANT:")
  assert not any(found.learn)
  want = [[0] * 3, [1] * 3, [2] * 3, *(square + 3), [5] * 3, [6] * 3, *(square + 7)]
  np.testing.assert_array_equal(found.positions, [*want, [9] * 3, [10] * 3])


def test_several_videos_are_before_the_first_question_or_at_its_marks(words):
  mark = templates.MEDIA_MARK
  line = lambda count: np.arange(count)[:, None]
  video = VideoTokens([[2, "it"], [1, "</s>"]], [line(2), line(1)])
  encode = lambda turns: tokenization.encode_conversation(
    words, BRIEF, turns, video=video
  )
  found = encode([("ring", None)])
  assert found.ids == ids("<s> USER: V V it V </s> ring ASSISTANT:")
  found = encode([(f"what {mark} is", "a ring"), (f"and {mark}", None)])
  assert found.ids == ids(
    "<s> USER: what V V it is ASSISTANT: a ring </s> USER: and V </s> ASSISTANT:"
  )
  assert learned(found) == ids("a ring </s>")
  np.testing.assert_array_equal(found.positions[:, 0], range(len(found.ids)))


@pytest.mark.parametrize("count", [1, 3])
def test_other_marks_than_videos_are_an_error(words, count):
  turns = [("what" + templates.MEDIA_MARK * count, None)]
  video = VideoTokens([["it"], ["is"]])
  with pytest.raises(ValueError, match=f"places of {count} videos .* there are 2"):
    tokenization.encode_conversation(words, BRIEF, turns, video=video)


def test_text_alone_has_the_axes_of_the_family(words):
  found = tokenization.encode_conversation(
    words, BRIEF, [("ring", None)], video=VideoTokens(axes=3)
  )
  np.testing.assert_array_equal(found.positions, [[i] * 3 for i in range(4)])
