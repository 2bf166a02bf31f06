"""Ids equal those of the published templates, for texts that are hard to tokenize.

Oracles: the published algorithms said anew, over whole strings; sentencepiece itself,
and a tokenizer that knows no special token, for what is typed; and each tokenizer's
own apply_chat_template.
"""

import json
import pathlib
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.data import tricky
from tests.data.tricky import (
  CHATML,
  ORDINARY,
  SOME,
  TALKS,
  answered,
  ids_where_nothing_typed_is_special,
  messages,
  ours,
  stripped,
)
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import templates, tokenization

ASSETS = pathlib.Path(templates.__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def spoken():
  return tricky.sentencepiece_model()


@pytest.fixture(scope="module")
def bare():
  return tricky.bytes_model()


@pytest.fixture(scope="module")
def known(tmp_path_factory, spoken, bare):
  """Name -> tokenizer."""
  folder = tmp_path_factory.mktemp("tokenizers")
  return {
    "llama": tricky.llama(folder / "llama", spoken, legacy=False),
    "llama_legacy": tricky.llama(folder / "llama_legacy", spoken, legacy=True),
    "qwen": tricky.qwen(folder / "qwen", bare),
    "tiny": tokenization.load_tokenizer(ASSETS / "tiny"),
  }


TOKENIZERS = ("llama", "llama_legacy", "qwen", "tiny")
DATA = [
  n
  for n, t in tokenization.CONVERSATION_TEMPLATES.items()
  if isinstance(t, templates.TemplatePieces)
]


# The published algorithms, said anew. One thing is not as published: a turn of ""
# leaves theirs open, as the one to be answered; ours is a turn that says nothing.

HUMANS, USERS = (
  f"A chat between a curious {who} and an artificial intelligence assistant. The "
  f"assistant gives helpful, detailed, and polite answers to the {who}'s questions."
  for who in ("human", "user")
)
LLAVA = {  # Name -> system text, roles, what stands after each role's turn.
  "vicuna_v1": (USERS, ("USER", "ASSISTANT"), (" ", "</s>")),
  "llava_v1": (HUMANS, ("USER", "ASSISTANT"), (" ", "</s>")),
  "llava_v0": (HUMANS, ("Human", "Assistant"), ("###", "###")),
  "brief": ("", ("USER", "ASSISTANT"), (" ", "</s>")),
}


def published_parts(name, talk):
  """[(text, whether a user or a model said it)], with <image> in the first question."""
  said = [(k, words) for turn in talk for k, words in enumerate(turn)]
  parts = []
  if name == "qwen":
    parts.append(
      ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False)
    )
  elif name != "brief":
    parts.append((LLAVA[name][0] + LLAVA[name][2][0], False))
  for i, (k, words) in enumerate(said):
    if name == "qwen":
      before = f"<|im_start|>{('user', 'assistant')[k]}\n"
      after = "<|im_end|>\n"
    else:
      before, after = f"{LLAVA[name][1][k]}: ", LLAVA[name][2][k]
    image = "" if i else "<image>\n"
    if words is None:
      parts.append((before.rstrip(" "), False))
      break
    if k == 1 and not words:
      before = before.rstrip(" ")
    parts += [(before + image, False), (words, True), (after, False)]
  return parts


def published_ids(tokenizer, name, talk):
  """The prompt as one string, cut at the image, each part tokenized as a whole."""
  prompt = "".join(words for words, _ in published_parts(name, talk))
  if name == "qwen" and talk[-1][1] is not None:
    prompt = prompt.removesuffix("\n")  # We end where a model would.
  before, after = prompt.split("<image>", 1)
  read = lambda part: tokenizer(part, add_special_tokens=False)["input_ids"]
  bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
  return [*bos, *read(before), VIDEO_TOKEN, *read(after)]


def test_strings_are_200_and_many_hold_a_special_token():
  assert len(tricky.STRINGS) == 200
  assert 80 < len(ORDINARY) < 150


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("of", TOKENIZERS)
def test_ids_equal_those_of_the_whole_published_prompt(known, of, name):
  for talk in ORDINARY:
    want = published_ids(known[of], name, stripped(talk))
    assert ours(known[of], name, talk).ids == want


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("of", TOKENIZERS)
def test_open_prompt_equals_the_published_one(known, of, name):
  for (question, _), _ in ORDINARY:
    want = published_ids(known[of], name, [(question.strip(), None)])
    assert ours(known[of], name, [(question, None)]).ids == want


@pytest.mark.parametrize("name", [n for n in DATA if n != "qwen"])
@pytest.mark.parametrize("of", ["llama", "llama_legacy"])
def test_what_is_typed_is_what_sentencepiece_says(known, spoken, of, name):
  """sentencepiece has no special tokens in texts; ours must not either."""
  library = sentencepiece.SentencePieceProcessor(model_proto=spoken)
  new_line = library.encode("\n")

  def read(run, first):
    if first or of == "llama_legacy":
      return library.encode(run)
    # No space is put before what goes on after a special token.
    return library.encode("\n" + run)[len(new_line) :]

  for talk in TALKS:
    want = ids_where_nothing_typed_is_special(
      published_parts(name, stripped(talk)), {"</s>": 2, "<image>": VIDEO_TOKEN}, read
    )
    assert ours(known[of], name, talk).ids == [1, *want]


@pytest.mark.parametrize("name", DATA)
def test_what_is_typed_is_what_a_tokenizer_without_special_tokens_says(
  known, bare, name
):
  special = templates.get_special_tokens(known["qwen"])
  markers = {**special, "<image>": VIDEO_TOKEN}
  for talk in TALKS:
    parts = published_parts(name, stripped(talk))
    if name == "qwen":
      parts[-1] = ("<|im_end|>", False)
    want = ids_where_nothing_typed_is_special(
      parts, markers, lambda run, first: bare.encode(run).ids
    )
    assert ours(known["qwen"], name, talk).ids == want


@pytest.mark.parametrize("name", tokenization.CONVERSATION_TEMPLATES)
@pytest.mark.parametrize("of", TOKENIZERS)
def test_special_ids_are_those_of_the_template(known, of, name):
  """As many as where nothing is said; unk may stand for a character."""
  tok = known[of]
  special = {*templates.get_special_tokens(tok).values()} - {tok.unk_token_id}
  count = lambda encoded: [i for i in encoded.ids if i in special]
  want = count(ours(tok, name, [("x", "x"), ("x", "x")]))
  for talk in SOME:
    assert count(ours(tok, name, talk)) == want


@pytest.mark.parametrize("name", tokenization.CONVERSATION_TEMPLATES)
@pytest.mark.parametrize("of", TOKENIZERS)
def test_what_is_learned_spells_every_answer_and_its_end_alone(known, of, name):
  tok = known[of]
  end = templates.get_end_text(tok, tokenization.get_template(name))
  lead = "" if name == "qwen" or (name, of) == ("chat_template", "qwen") else " "
  for talk in SOME:
    found = ours(tok, name, talk)
    learned = [i for i, on in zip(found.ids, found.learn, strict=True) if on]
    want = "".join(lead + a + end if a else end for _, a in stripped(talk))
    if of in ("qwen", "tiny"):
      want = unicodedata.normalize("NFC", want)
    if of in ("llama", "llama_legacy"):  # They decode without the first space.
      want = want.removeprefix(" ")
    assert tok.decode(learned) == want


@pytest.mark.parametrize("name", tokenization.CONVERSATION_TEMPLATES)
@pytest.mark.parametrize("of", TOKENIZERS)
def test_what_is_learned_goes_on_from_the_prompt(known, of, name):
  for (question, answer), _ in SOME:
    open_ended = ours(known[of], name, [(question, None)])
    whole = ours(known[of], name, [(question, answer)])
    start = len(open_ended.ids)
    assert whole.ids[:start] == open_ended.ids
    assert whole.learn == [False] * start + [True] * (len(whole.ids) - start)


@pytest.mark.parametrize("of", TOKENIZERS)
def test_chat_template_equals_that_of_transformers(known, of):
  tok = known[of]
  for talk in answered(ORDINARY):
    want = tok.apply_chat_template(messages(stripped(talk)), return_dict=False)
    got = ours(tok, "chat_template", talk, video_tokens=0).ids
    assert got == want[: len(got)]
    assert tok.decode(want[len(got) :]).strip() == ""  # We end where a model would.


def test_chat_template_learns_what_its_generation_marks_say(known):
  for talk in answered(ORDINARY):
    want = known["qwen"].apply_chat_template(
      messages(stripped(talk)), return_dict=True, return_assistant_tokens_mask=True
    )
    got = ours(known["qwen"], "chat_template", talk, video_tokens=0)
    assert got.learn == [on == 1 for on in want["assistant_masks"][: len(got.ids)]]


@pytest.mark.parametrize("video_tokens", [0, 3])
def test_chat_template_in_jinja_equals_the_same_as_data(known, video_tokens):
  for talk in TALKS:
    jinja = ours(known["qwen"], "chat_template", talk, video_tokens)
    same = ours(known["qwen"], "qwen", talk, video_tokens)
    assert jinja[:2] == same[:2]
    np.testing.assert_array_equal(jinja.positions, same.positions)


@pytest.mark.parametrize("of, name, end", [
  ("llama", "vicuna_v1", "</s>"), ("llama", "chat_template", "</s>"),
  ("tiny", "brief", "</s>"), ("qwen", "qwen", "<|im_end|>"),
  ("qwen", "chat_template", "<|im_end|>"),
])  # fmt: skip
def test_end_id_is_the_last_id_of_an_answer(known, of, name, end):
  found = tokenization.find_eos_id(known[of], tokenization.get_template(name))
  assert found == known[of].convert_tokens_to_ids(end)
  assert ours(known[of], name, [("What?", "A.")]).ids[-1] == found
  empty = ours(known[of], name, [("What?", "")])
  assert empty.ids[-1] == found
  assert sum(empty.learn) == 1


@pytest.mark.parametrize("of, name", [("llama", "llava_v0"), ("qwen", "vicuna_v1")])
def test_end_that_is_no_special_token_is_an_error_that_names_it(known, of, name):
  template = tokenization.get_template(name)
  with pytest.raises(ValueError, match=f"{template.end}.*no special token"):
    tokenization.find_eos_id(known[of], template)


@pytest.mark.parametrize("of, name", [
  ("llama", "vicuna_v1"), ("llama", "chat_template"), ("tiny", "brief"),
  ("qwen", "qwen"), ("qwen", "chat_template"),
])  # fmt: skip
@pytest.mark.parametrize("reply", ["", "The score of it is"])
def test_a_follow_up_is_the_next_turn_in_the_template_of_the_model(
  known, of, name, reply
):
  template = tokenization.get_template(name)
  found = tokenization.encode_follow_up(known[of], template, "Right?", reply)
  whole = ours(known[of], name, [("What?", "A."), ("Right?", reply or None)]).ids
  answered = ours(known[of], name, [("What?", "A.")]).ids
  rest = whole[len(answered) :]
  assert found == rest[: len(found)]
  # Only the end of the reply is left, if there is one.
  assert len(rest) - len(found) == bool(reply)


@pytest.mark.parametrize("of", TOKENIZERS)
def test_suffix_is_what_a_further_turn_would_be(known, of):
  name = "qwen" if of == "qwen" else "brief"
  template = tokenization.get_template(name)
  whole = ours(known[of], name, [("What?", "A."), ("Right?", None)]).ids
  answered = ours(known[of], name, [("What?", "A.")]).ids
  said = template.between + template.user + "Right?" + template.assistant
  assert tokenization.encode_suffix(known[of], said) == whole[len(answered) :]


def with_template(known, jinja):
  made = AutoTokenizer.from_pretrained(known["qwen"].name_or_path)
  made.chat_template = jinja
  return made


@pytest.mark.parametrize("jinja, said", [
  (None, "the tokenizer has none"),
  ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "special token after"),
  ("{{ messages[0]['content'] }}<|im_end|>", "a special token after an answer"),
  # The answers of earlier turns are dropped.
  ("{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
   "{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}", "turn 1 of 2"),
  ("{{ messages | length }}" + CHATML, "turn 1 of 2"),
  (CHATML.replace("{% if m", "{{ messages[0]['content'] }}{% if m"), "exactly once"),
])  # fmt: skip
def test_chat_template_that_cannot_be_learned_is_an_error(known, jinja, said):
  talk = [("What?", "A."), ("And?", "B.")]
  with pytest.raises(ValueError, match=said):
    ours(with_template(known, jinja), "chat_template", talk)


def test_turn_that_a_chat_template_drops_is_an_error_though_its_answer_is_empty(known):
  drops = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
    "{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
  )
  with pytest.raises(ValueError, match="turn 2 of 2"):
    ours(with_template(known, drops), "chat_template", [("What?", ""), ("And?", "B.")])


def test_spaces_are_learned_where_a_tokenizer_trims_them_off_its_offsets(bare):
  """As Llama 3's does."""
  spec = json.loads(bare.to_str())
  spec["post_processor"] = {"type": "ByteLevel", "trim_offsets": True,
                            "add_prefix_space": False, "use_regex": True}  # fmt: skip
  spec["decoder"] = spec["post_processor"]
  model = tokenizers.Tokenizer.from_str(json.dumps(spec))
  tok = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
  found = ours(tok, "brief", [("What?", "a   b")])
  learned = [i for i, on in zip(found.ids, found.learn, strict=True) if on]
  assert tok.decode(learned) == " a   b</s>"


def test_chat_template_may_write_history_otherwise_than_a_last_answer(known):
  """As Qwen3 does, which writes an empty thought before the last answer alone."""
  think = CHATML.replace(
    "{% generation %}", "{% generation %}{% if loop.last %}<think>{% endif %}"
  )
  tok = with_template(known, think)
  found = ours(tok, "chat_template", [("What?", "A."), ("And?", "B.")])
  learned = [i for i, on in zip(found.ids, found.learn, strict=True) if on]
  assert tok.decode(learned) == "A.<|im_end|><think>B.<|im_end|>"


@pytest.mark.parametrize("typed", ["\ud83d", "a\udc00b", "\ufdd0</s>\ufdd1"])
@pytest.mark.parametrize("name", ["vicuna_v1", "chat_template"])
def test_what_is_no_character_is_an_error_that_names_it(known, name, typed):
  bad = next(c for c in typed if not c.isascii())
  for talk in ([(typed, None)], [("What?", typed)]):
    with pytest.raises(ValueError, match=f"U\\+{ord(bad):04X} at index .*replace it"):
      ours(known["llama"], name, talk)
