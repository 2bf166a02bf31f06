"""Preferences of each format, and those whose meaning is not clear."""

import pytest

from vlmrlaif_jax.data.formats.preferences import expand_json_text, has_pair, read_pair

ASK = {"role": "user", "content": "A?"}
SYSTEM = {"role": "system", "content": "Be."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))
CHOSEN = {"chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
  "row",
  [
    {"question": "A?", "output_1": "bad", "output_2": "good", "preference": 2},
    {"question": "A?", "output_1": GOOD, "output_2": BAD, "preference": 1},
    {
      "question": "A?",
      "response_1": "bad",
      "response_2": "good",
      "overall_response": 2,
    },
    {
      "prompt": "A?",
      "response_0": "bad",
      "response_1": "good",
      "better_response_id": 1,
    },
    {"prompt": "A?", **CHOSEN},
    {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    {"prompt": "A?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    {"messages": [ASK], **CHOSEN},
    {"messages": [ASK], "chosen": GOOD, "rejected": {"from": "gpt", "value": "bad"}},
    {"messages": [ASK, GOOD], "rejected_response": "bad"},
    {"query": "A?", "response": "good", "rejected_response": "bad"},
    {"messages": [ASK, GOOD], "rejected_messages": [ASK, BAD]},
    {"conversations": [ASK, GOOD], "rejected_conversations": [ASK, BAD]},
    {
      "input": {"messages": [ASK]},
      "preferred_output": [GOOD],
      "non_preferred_output": [BAD],
    },
    {
      "chosen": "\n\nHuman: A?\n\nAssistant: good",
      "rejected": "\n\nHuman: A?\n\nAssistant: bad",
    },
    {"prompt": "\n\nHuman: A?\n\nAssistant:", "chosen": " good", "rejected": " bad"},
    {"instruction": "A?", "input": "", **CHOSEN},
  ],
)
def test_each_format_is_the_same_preference(row):
  assert has_pair(row)
  pair = read_pair(row)
  outputs = [pair.output_1, pair.output_2]
  assert outputs[pair.preference - 1] == "good" and sorted(outputs) == ["bad", "good"]
  asked = [message for message in pair.messages if message.role == "human"]
  assert [message.text for message in asked] == ["A?"]


def test_turns_before_the_question_are_read():
  talk = [ASK, GOOD, {"role": "user", "content": "B?"}]
  pair = read_pair({"chosen": [*talk, GOOD], "rejected": [*talk, BAD]})
  assert [message.text for message in pair.messages] == ["A?", "good", "B?"]


def test_json_in_the_text_of_a_row_is_expanded():
  row = {"idx": 1, "text": '{"question": "A?", "chosen": "a"}'}
  assert expand_json_text(row) == {"idx": 1, "question": "A?", "chosen": "a"}
  for text in ("{A?}", "A?", "[1]", 3):
    assert expand_json_text({"text": text}) == {"text": text}


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"prompt": "A?", "chosen": "good"}, 'it has no "rejected"'),
    ({"prompt": "A?", "chosen": "good", "rejected": " "}, '"rejected" is empty'),
    ({"prompt": "A?", **CHOSEN, "rejected": ["a", "b"]}, "one answer, not 2"),
    ({"prompt": "A?", "chosen": ASK, "rejected": BAD}, '"chosen" is from user'),
    ({"prompt": "B?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "differs from"),
    (
      {"chosen": [ASK, GOOD], "rejected": [ASK | {"content": "B?"}, BAD]},
      "differ before the last answer",
    ),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, ASK]}, "end with an answer"),
    ({"messages": [ASK], "rejected_response": "bad"}, "must end with an answer"),
    ({**CHOSEN, "output_1": "a", "output_2": "b", "preference": 1}, "two formats"),
    (CHOSEN, "must start with"),
    ({"prompt": "A?", "output_1": "a", "output_2": "b", "preference": 0}, "not 0"),
    (
      {"prompt": "A?", "response_1": "a", "response_2": "b", "overall_response": 3},
      "overall_response must be 1 or 2, not 3",
    ),
    (
      {"prompt": "A?", "response_0": "a", "response_1": "b", "better_response_id": 2},
      "better_response_id must be 0 or 1, not 2",
    ),
    ({"question": "A?"}, 'it has no "output_1"'),
    (
      {"prompt": "A?", "chosen": "<video>", "rejected": "b"},
      "an answer must be text",
    ),
  ],
)
def test_preference_that_is_not_clear_is_an_error(row, reason):
  with pytest.raises(ValueError, match=reason):
    read_pair(row)
