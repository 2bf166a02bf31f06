"""Chat templates that read a list of parts, as those of LLaVA-OneVision."""

import pytest

from tests.helpers import onevision
from vlmrlaif_jax.core.types import VIDEO_TOKEN
from vlmrlaif_jax.data import templates, tokenization
from vlmrlaif_jax.data.processors.interface import Grid, Visual, lay_out

VIDEO = lay_out(onevision.PROCESSOR, Visual(Grid(2, 3, 3), (0.0, 1.0)))
CHAT = templates.get_template("chat_template")
QUESTION = "Is <video> a word, <|im_end|>?"


def encode(tokenizer, turns):
  return tokenization.encode_conversation(tokenizer, CHAT, turns, video=VIDEO)


@pytest.mark.parametrize("template", [onevision.TEMPLATE, onevision.OLD_TEMPLATE])
def test_ids_of_a_prompt_equal_those_of_transformers(template):
  tokenizer = onevision.make_tokenizer(template)
  content = [{"type": "video"}, {"type": "text", "text": "What moves?"}]
  text = tokenizer.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
  )
  expanded = text.replace("<video>", "<video>" * 19)
  want = tokenizer(expanded, add_special_tokens=False).input_ids
  got = encode(tokenizer, [("What moves?", None)]).ids
  video = tokenizer.convert_tokens_to_ids("<video>")
  assert [video if i == VIDEO_TOKEN else i for i in got] == want


def test_special_tokens_that_a_user_types_are_text():
  tokenizer = onevision.make_tokenizer()
  ids = encode(tokenizer, [(QUESTION, None)]).ids
  assert ids.count(VIDEO_TOKEN) == 19
  assert tokenizer.convert_tokens_to_ids("<video>") not in ids
  assert QUESTION in tokenizer.decode([i for i in ids if i != VIDEO_TOKEN])


def test_answers_are_learned_with_their_end():
  tokenizer = onevision.make_tokenizer()
  row = encode(tokenizer, [("What?", "A ring."), ("Why?", "It moves.")])
  learned = [i for i, learn in zip(row.ids, row.learn, strict=True) if learn]
  assert tokenizer.decode(learned) == "A ring.<|im_end|>It moves.<|im_end|>"


def test_template_whose_history_differs_from_its_prompt_is_refused():
  """The older one has a space after "assistant" in history, not in prompts."""
  tokenizer = onevision.make_tokenizer(onevision.OLD_TEMPLATE)
  with pytest.raises(ValueError, match="does not render turn 1 of 1"):
    encode(tokenizer, [("What?", "A ring.")])
