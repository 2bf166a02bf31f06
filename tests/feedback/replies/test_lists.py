"""A table of lists with their right reading."""

import pytest

from vlmrlaif_jax.feedback.replies.lists import parse_list

# Full-width characters are escapes: \uff21 is A, \uff08 a bracket, \uff1a a colon.

LISTS = [
  ("- A dog runs.\n- It is brown.", 2),
  ("Sure! Here are the facts:\n- A dog runs.\n- It is brown.", 2),
  ("**Facts:**\n- A dog runs.\n- It is brown.", 2),
  ("### Facts:\n- A dog runs.\n- It is brown.", 2),
  ("Facts:\n- A dog runs.\n- It is brown.\n\nLet me know if you need more!", 2),
  ("1. A dog runs.\n2. It is brown.", 2),
  ("1) A dog runs.\n2) It is brown.", 2),
  ("(1) A dog runs.\n(2) It is brown.", 2),
  ("① A dog runs.\n② It is brown.", 2),
  ("\uff11\uff0eA dog runs.\n\uff12\uff0eIt is brown.", 2),
  ("1、A dog runs.\n2、It is brown.", 2),
  ("一、A dog runs.\n二、It is brown.", 2),
  ("a) A dog runs.\nb) It is brown.", 2),
  ("* A dog runs.\n* It is brown.", 2),
  ("• A dog runs.\n• It is brown.", 2),
  ("\u2013 A dog runs.\n\u2013 It is brown.", 2),
  ("-A dog runs.\n-It is brown.", 2),
  ("```\n- A dog runs.\n- It is brown.\n```", 2),
  ('Here you go:\n```json\n["A dog runs.", "It is brown."]\n```\nDone.', 2),
  ('["A dog runs.", "It is brown."]', 2),
  ("['A dog runs.', 'It is brown.']", 2),
  ('{"facts": ["A dog runs.", "It is brown."]}', 2),
  ('[{"fact": "A dog runs."}, {"fact": "It is brown."}]', 2),
  ("A dog runs.\nIt is brown.", 2),
  ("Here are the facts:\nA dog runs.\nIt is brown.\nI hope this helps!", 2),
  ("1. **A dog runs.**\n2. **It is brown.**", 2),
  ("- Fact 1: A dog runs.\n- Fact 2: It is brown.", 2),
  ("1. A dog runs. 2. It is brown.", 2),
  ("- A dog\n  runs.\n- It is brown.", 2),
  ("<think>- A cat.</think>- A dog runs.\n- It is brown.", 2),
  ("事实\uff1a\n- A dog runs.\n- It is brown.", 2),
  ("- [ ] A dog runs.\n- [x] It is brown.", 2),
  ('- "A dog runs."\n- "It is brown."', 2),
  ("A dog runs.", 1),
  ("None", 0),
  ("None.", 0),
  ("- None", 0),
  ("### Facts:\nNone", 0),
  ("No facts.", 0),
  ("There are no facts in the answer.", 0),
  ("[]", 0),
  ("无", 0),
  ("", 0),
  ("I'm sorry, I cannot help with that.", None),
  ("<think>- A dog runs.\n- It is brown.", None),
  ("Sure!", None),
  # Written before the parser read them.
  ("The facts are as follows:\n\n• A dog runs.\n• It is brown.\n\nThese are "
   "all the facts.", 2),
  ("1: A dog runs.\n2: It is brown.", 2),
  ("Facts: A dog runs.\nIt is brown.", 2),
  ("There are no factual statements in this answer.", 0),
  ("- A dog runs.\n\n- It is brown.\n\nNote: opinions were left out.", 2),
  ("N/A", 0),
  ("Certainly! Below are the facts:\n\n1. A dog runs.\n2. It is brown.\n\nFeel "
   "free to ask.", 2),
  ("→ A dog runs.\n→ It is brown.", 2),
  ("<ul><li>A dog runs.</li>\n<li>It is brown.</li></ul>", 2),
  ("- A dog runs.\n- It is brown.\n- ", 2),
  ("以下是事实\uff1a\n1、A dog runs.\n2、It is brown.", 2),
  ("The answer contains no facts.", 0),
  ("Facts: none", 0),
  ("### Facts:\n1. A dog runs.", 1),
  ("[\n  \"A dog runs.\",\n  \"It is brown.\",\n]", 2),
  ("A dog runs.\n\nIt is brown.", 2),
  ("**1.** A dog runs.\n**2.** It is brown.", 2),
  ("**1. A dog runs.**\n**2. It is brown.**", 2),
  ("1) A dog runs.\n\n2) It is brown.\n\nThat's all!", 2),
  ("- A dog runs.\nI hope it helps.", 1),
  ("* **A dog runs.**\n* **It is brown.**", 2),
  ("Okay, here's the list:\n- A dog runs.\n- It is brown.", 2),
  ("No claims.", 0),
  ("[\"A dog runs.\"]", 1),
  ("Fact 1: A dog runs.\nFact 2: It is brown.", 2),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "count"), LISTS)
def test_a_list_is_its_items_without_the_words_around_it(reply, count):
  items = ["A dog runs.", "It is brown."]
  assert parse_list(reply) == (None if count is None else items[:count])


def test_an_empty_bullet_has_its_item_on_the_next_line():
  text = "### Facts:\n- The ball is red.\n\n-It rolls.\n  - \n The cup is off-white."
  items = ["The ball is red.", "It rolls.", "The cup is off-white."]
  assert parse_list(text) == items


@pytest.mark.parametrize(
  "item",
  ["3.5 metres is the height.", "10:30 is on the clock.", "The sign reads [EXIT].",
   "A. Smith is named.", "-5 degrees is shown.", "5 m² of snow lie there."],
)  # fmt: skip
def test_a_claim_is_kept_as_it_is(item):
  assert parse_list(f"{item}\nA dog runs.") == [item, "A dog runs."]
  assert parse_list(f"- {item}\n- A dog runs.") == [item, "A dog runs."]
