"""Parses rankings of several responses.

The prompt of `feedback/rankers.py` requests a list of numbers from the best response to
the worst (Oracle-RLAIF, 2510.02561): "[3, 1, 2]".
"""

import re

from vlmrlaif_jax.feedback.replies.cleaning import clean_reply

_NOUN = (
  r"(?:responses?|outputs?|answers?|candidates?|options?|models?|captions?|"
  r"回答|答案|输出|响应|回复)"
)
_ITEM = (
  rf"(?:{_NOUN} ?)?(?:no\. ?|# ?)?[\[(]{{0,2}}"
  r" ?(?<![\d.])\d{1,3}(?!\.?\d) ?[\])]{0,2}"
)
_CHAIN = re.compile(rf"{_ITEM}(?: ?[>=<,] ?{_ITEM}){{1,200}}")
_THEN = re.compile(
  r"(?: (?:is|comes|ranks|as|are))?(?: the)?(?: (?:best|first|second|third|next))?,? "
  r"?(?:and )?\b(?:then|followed by|next(?: is)?|after that|finally|lastly|and last|"
  r"better than|is better than)\b(?: (?:comes|by|is))? ?|"
  r"优于|好于|然后(?:是)?|其次(?:是)?"
)
_AND = re.compile(rf", and (?={_ITEM})")
# Where a list without brackets or signs is a ranking, and not "1, 2, 3 are good".
_BEFORE_LIST = re.compile(
  r"(?:^|[\n:=({\"']|\bis|\b(?:rank|ranking|order|place)(?: (?:them|as|it))?) ?$"
)
_AFTER_LIST = re.compile(r" ?[.)}\"']{0,3} ?(?:$|\n|because\b)")
_PLACE = re.compile(
  rf"^ ?(?:rank ?|no\. ?|第)?#?(\d{{1,3}})(?:st|nd|rd|th|名)? ?(?: ?(?:place|best))?"
  rf"[.):、-]{{1,2}} ?(?:{_NOUN} ?#?[\[(]?(\d{{1,3}})|[\[(](\d{{1,3}})[\])])(?!\d)",
  re.MULTILINE,
)
_ALONE = re.compile(rf"^ ?(?:{_NOUN} ?#?\d{{1,3}}|\[\d{{1,3}}\])\.?$", re.MULTILINE)
_FINAL = re.compile(r"\b(?:final|overall)\b[\w ]{0,20}[:=]? ?$|最终\w{0,6}[:=]? ?$")


def parse_ranking(text: str, count: int) -> list[int] | None:
  """Returns the rank of each response, 0 for the best; None if a reply has no ranking.

  Ties ("2 > 1 = 3") have equal ranks, as in 0, 1, 1. A ranking names each response
  exactly once. Two rankings that differ are none, except for a final one.

  >>> parse_ranking("[3, 1, 2]", 3)
  [1, 2, 0]

  Args:
    text: The reply.
    count: Number of responses, which have the numbers 1 to `count`.
  """
  plain = clean_reply(text).lower()
  joined = _AND.sub(", ", _THEN.sub(" > ", plain))
  chains = [*_CHAIN.finditer(joined)]
  before = lambda chain: joined[max(chain.start() - 40, 0) : chain.start()]
  finals = [chain[0] for chain in chains if _FINAL.search(before(chain))]
  for form in (
    finals[-1:],
    [each[0] for each in chains if each[0].startswith("[") and ">" not in each[0]],
    [each[0] for each in chains if re.search("[<>]", each[0])],
    [
      each[0]
      for each in chains
      if _BEFORE_LIST.search(before(each)) and _AFTER_LIST.match(joined, each.end())
    ],
  ):
    if form:
      ranks = {_rank_chain(chain, count) for chain in form}
      break
  else:
    ranks = {_rank_lines(plain, count)}
  if len(ranks) != 1 or None in ranks:
    return None
  [order] = ranks
  if order and re.search(r"\bworst to (?:the )?best\b|从差到好", plain):
    order = tuple(sum(other > rank for other in order) for rank in order)
  return list(order) if order else None


def _rank_chain(chain: str, count: int) -> tuple[int, ...] | None:
  """Returns the ranks that a chain such as "[2] > 1 = 3" gives."""
  items = [int(number) for number in re.findall(r"\d+", chain)]
  signs = re.findall("[>=<,]", chain)
  if sorted(items) != [*range(1, count + 1)] or len({*signs} - {"="}) > 1:
    return None
  if "<" in signs:
    items, signs = items[::-1], signs[::-1]
  ranks = {items[0]: 0}
  for place, (item, before, sign) in enumerate(
    zip(items[1:], items, signs, strict=False), 1
  ):
    ranks[item] = ranks[before] if sign == "=" else place
  return tuple(ranks[number] for number in range(1, count + 1))


def _rank_lines(plain: str, count: int) -> tuple[int, ...] | None:
  """Returns the ranks of "1. Response 3" and so on, or of a line for each response."""
  places = {int(m[1]): int(m[2] or m[3]) for m in _PLACE.finditer(plain)}
  order = [places[place] for place in sorted(places)]
  if not places:
    order = [int(re.findall(r"\d+", line[0])[0]) for line in _ALONE.finditer(plain)]
  elif sorted(places) != [*range(1, count + 1)]:
    return None
  return _rank_chain(" > ".join(map(str, order)), count) if len(order) > 1 else None
