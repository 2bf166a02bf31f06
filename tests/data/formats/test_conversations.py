"""Conversations of each format as turns, and what is not supported."""

import pytest

from vlmrlaif_jax.data.formats.conversations import read_messages, read_transcript
from vlmrlaif_jax.data.formats.media import Medium
from vlmrlaif_jax.data.formats.turns import join_turns
from vlmrlaif_jax.data.templates import PART_MARKS

ASK = {"role": "user", "content": "A?"}
REPLY = {"role": "assistant", "content": "a"}
MORE = [{"role": "user", "content": "B?"}, {"role": "assistant", "content": "b"}]


def turns(row, **settings):
  given = {"need_answer": True, "has_tags": True} | settings
  return join_turns(read_messages(row), [Medium("video", "a.mp4")], **given)


@pytest.mark.parametrize(
  "row",
  [
    {"messages": [ASK, REPLY]},
    {"conversation": [{"from": "Human", "value": "A?"}, {"from": "GPT", "value": "a"}]},
    {
      "messages": '[{"role": "user", "content": "A?"}, {"role": "gpt", "content": "a"}]'
    },
    {"conversations": {"from": ["human", "gpt"], "value": ["A?", "a"]}},
    {"messages": [ASK | {"content": ["A?"]}, REPLY | {"content": {"text": "a"}}]},
    {"messages": [ASK | {"value": None}, REPLY | {"tool_calls": []}]},
    {"messages": [ASK | {"content": [{"type": "input_text", "text": "A?"}]}, REPLY]},
    {"question": "A?", "answer": "a"},
    {"question": "A?", "turns": [["A?", "a"]]},
    {"query": "A?", "response": "a"},
    {"instruction": "A?", "input": "", "output": "a"},
    {"prompt": "A?", "completion": "a"},
    {"prompt": "\n\nHuman: A?\n\nAssistant: a"},
    {"prompt": [ASK], "completion": [REPLY]},
    {"q": "A?", "a": "a"},
    {"QA": [{"q": "A?", "a": "a"}]},
    {"texts": [{"user": "A?", "assistant": "a"}]},
  ],
)
def test_each_format_is_the_same_conversation(row):
  assert turns(row).turns == [("A?", "a")]


@pytest.mark.parametrize(("answer", "text"), [(3, "3"), (0, "0"), (2.5, "2.5")])
def test_number_is_an_answer(answer, text):
  assert turns({"question": "A?", "answer": answer}).turns == [("A?", text)]
  row = {"messages": [ASK, REPLY | {"content": answer}]}
  assert turns(row).turns == [("A?", text)]


@pytest.mark.parametrize(
  "row",
  [
    {"system": "Be brief.", "messages": [ASK, REPLY, *MORE]},
    {"system_prompt": "Be brief.", "messages": [ASK, REPLY, *MORE]},
    {"messages": [{"role": "system", "content": "Be brief."}, ASK, REPLY, *MORE]},
    {"messages": [{"role": "developer", "content": "Be brief."}, ASK, REPLY, *MORE]},
    {
      "system": "Be brief.",
      "messages": [{"role": "system", "content": "Be brief."}, ASK, REPLY, *MORE],
    },
    {"query": "B?", "response": "b", "history": [["A?", "a"]], "system": "Be brief."},
  ],
)
def test_system_text_starts_the_first_question(row):
  assert turns(row).turns == [("Be brief.\n\nA?", "a"), ("B?", "b")]


@pytest.mark.parametrize("key", ["loss", "train", "weight", "loss_weight"])
@pytest.mark.parametrize(("off", "on"), [(False, True), (0, 1), (0.0, None)])
def test_flag_excludes_an_answer_from_the_loss(key, off, on):
  row = {"messages": [ASK, REPLY | {key: off}, MORE[0], MORE[1] | {key: on}]}
  assert turns(row).loss == [False, True]


def test_media_in_messages_are_placeholders_and_names():
  content = [
    {"type": "video", "video": "a.mp4", "video_start": 1},
    {"type": "text", "text": "A?"},
  ]
  row = {"messages": [ASK | {"content": content}, REPLY]}
  assert turns(row).turns == [("A?", "a")]
  [message, _] = read_messages(row)
  assert message.text == PART_MARKS["video"] + "A?"
  assert message.media == (("video", "a.mp4"),)
  assert message.options == (("video_start", 1),)


@pytest.mark.parametrize(
  ("part", "name"),
  [
    ({"type": "image_url", "image_url": {"url": "a.jpg"}}, "a.jpg"),
    ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "a.mp4"),
    ({"image": "a.jpg"}, "a.jpg"),
    ({"type": "image", "path": "a.jpg", "text": None}, "a.jpg"),
    (
      {"type": "image", "source": {"type": "base64", "data": "AA=="}},
      "data:;base64,AA==",
    ),
  ],
)
def test_media_have_several_spellings(part, name):
  [message] = read_messages({"messages": [ASK | {"content": [part, "A?"]}]})
  assert message.media[0][1] == name


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"messages": [ASK, REPLY], "conversations": [ASK]}, "it has both"),
    ({"messages": [ASK, {"role": "tool", "content": "3"}]}, "turn 2: role must be one"),
    ({"messages": [ASK, REPLY | {"tool_calls": [{}]}]}, "the models call no tools"),
    ({"messages": [ASK, REPLY | {"reasoning_content": "x"}]}, "write it into the text"),
    ({"messages": [ASK, REPLY | {"mask": False}]}, 'turn 2 has "mask"'),
    ({"messages": [ASK, REPLY | {"loss_scale": 0.0}]}, 'turn 2 has "loss_scale"'),
    ({"messages": [ASK, REPLY | {"loss": 0.5}]}, '"loss" must be true or false'),
    ({"messages": [ASK, REPLY | {"loss": True, "train": False}]}, "differ"),
    ({"messages": [ASK | {"loss": True}, REPLY]}, "only answers can be trained"),
    ({"messages": [ASK, REPLY | {"loss": False}]}, "excludes all answers"),
    ({"messages": [ASK, REPLY, {"role": "system", "content": "x"}]}, "turn 3 is from"),
    (
      {"system": "x", "messages": [{"role": "system", "content": "y"}, ASK, REPLY]},
      "differs from the system turn",
    ),
    ({"messages": [{"role": "system", "content": "<video>x"}, ASK, REPLY]}, "turn 1"),
    ({"messages": [ASK, REPLY, ASK | {"content": "<video>"}, REPLY]}, "turn 3: empty"),
    ({"messages": [ASK, {"role": "assistant", "content": "<image>"}]}, "must be text"),
    ({"messages": [ASK | {"content": "Is <image> red?"}, REPLY]}, "within a sentence"),
    ({"messages": [ASK | {"content": [{"type": "audio"}]}, REPLY]}, "type 'audio'"),
    ({"question": "A?", "answer": ["a", "b"]}, "the answer must be a text"),
    ({"question": "A?", "answer": True}, "the answer must be a text, not True"),
    ({"question": "A?", "answer": "a", "history": [["A?"], 3]}, "pairs"),
    ({"prompt": "A?", "completion": "a", "loss": [True, False]}, "for each turn"),
    ({"caption": "a"}, "it has no"),
    ({"texts": []}, "it has no question"),
  ],
)
def test_row_that_is_not_supported_is_an_error(row, reason):
  with pytest.raises(ValueError, match=reason):
    turns(row)


def test_placeholder_of_a_question_without_tags_is_text():
  row = {"question": "Is <image> red?", "answer": "No."}
  assert turns(row, has_tags=False).turns == [("Is <image> red?", "No.")]


def test_transcript_may_have_several_turns():
  text = "\n\nHuman: A?\n\nAssistant: a\n\nHuman: B?\n\nAssistant:"
  found = [(message.role, message.text) for message in read_transcript(text)]
  assert found == [("human", "A?"), ("gpt", "a"), ("human", "B?")]
