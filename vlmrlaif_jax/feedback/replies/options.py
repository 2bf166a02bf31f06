"""Parses yes or no, and the option of a multiple choice.

RLAIF-V's claims request "Please answer yes or no", zero-shot QA {"pred": "yes"}, and
Video-MME "the letter of the right option and nothing else".
"""

import re
from collections.abc import Sequence

from vlmrlaif_jax.feedback.replies.cleaning import clean_reply

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Yes or no.

_WORDS = {
  **dict.fromkeys(
    ("yes", "yeah", "yep", "yup", "true", "是", "是的", "对", "对的"), True
  ),
  **dict.fromkeys(("no", "nope", "nah", "false", "否", "不", "不是", "不对"), False),
}
_YES_NO = (
  r"(?P<word>yes|yeah|yep|yup|true|nope|nah|false|"
  r"no(?! (?:one|longer|doubt|problem|matter|idea|clue|answer|comment|more|less|info|"
  r"information)\b|\. ?\d|-)|不是|不对|否|(?:是的?|对的?|不)(?=[^\w]|$))"
  r"(?![a-z0-9])"
)
_LEAD = (
  r"(?:(?:well|so|hmm|okay|ok|definitely|absolutely|certainly|my answer is|"
  r"i (?:think|believe|guess)|i(?: would|'d) say),? )?"
)
_FIRST_WORD = re.compile(rf"\W{{0,8}}{_LEAD}[\"'\[(]{{0,3}}{_YES_NO}")
_OTHER_WORD = re.compile(
  r"[\"'\])]{0,3}\W{0,6}(?:(?:and|or|but|also|actually|wait|rather)\W{1,3}){0,3}"
  r"(yes|no)(?=\W{0,3}$|[.,!;\n])"
)
_LABELED_WORD = re.compile(
  r"(?<![a-z_])(?:pred|prediction|answer|verdict|judge?ment|conclusion|match|result|"
  r"correct|label|response|答案|结论|回答|判断)(?: (?:to|for)(?: [a-z]{1,12}){1,3})?"
  rf"[\"']? ?(?:[:=]|\bis\b:?|[是为]:?)\s?[\"'\[(]{{0,3}}{_YES_NO}(?! ?(?:/|or ))"
)
_BOXED_WORD = re.compile(rf"\[\[ ?{_YES_NO} ?\]\]")


def parse_yes_no(text: str) -> bool | None:
  """Returns whether a reply is yes; None if it is neither or both.

  The answer is a word in a box, or after a label ("Answer: yes"), or the first word.

  >>> parse_yes_no("No, the ball is red.")
  False
  >>> parse_yes_no("None of the balls moves.")
  """
  plain = clean_reply(text).lower()
  for form in (_BOXED_WORD, _LABELED_WORD):
    answers = {_WORDS[match["word"]] for match in form.finditer(plain)}
    if answers:
      return answers.pop() if len(answers) == 1 else None
  first = _FIRST_WORD.match(plain)
  if first is None:
    return None
  answer = _WORDS[first["word"]]
  other = _OTHER_WORD.match(plain, first.end())
  if other and (other[1] == "yes") != answer:
    return None
  return None if re.match(r" ?/ ?(?:yes|no)\b", plain[first.end() :]) else answer


# Options. Forms: "C", "(c)", "C. A dog.", "The answer is (C).", "A dog."

_BEFORE = r"[\s(\[\"']{0,5}"
# A letter by itself, as in "A or B". "A man", "I think", "D.C." and "B-roll" have none.
_ALONE = (
  r"(?<![A-Za-z0-9_.'-])(?:[B-HJ-Z]|[AI](?!\s+(?!(?:or|and|is)\b)[a-z]))"
  r"(?![A-Za-z0-9_'-]|\.\w)"
)
_DENIED = r"(?<![Nn]ot )(?<![Nn]or )(?<!either )(?<!不是)(?<!不选)"
_BARE = re.compile(r"\W{0,10}([A-Za-z])\W{0,10}")
_FIRST = re.compile(
  rf"{_BEFORE}(?:[Oo]ption\s)?([A-Z])"
  r"(?:\s*$|\s*\n|[.):\]、](?![A-Za-z0-9_])|,?\s(?:because|since)\b)"
)
_STATED = re.compile(
  r"(?i:(?:answer|choice|选项|答案)[\"']?\s?(?:is\s?:?|:|=|[是为选]{1,2}:?)"
  rf"(?:\s?option)?|选择?){_BEFORE}({_ALONE}|[a-z](?=\W{{0,4}}$|[\"')\]]))"
)
_BOXED = re.compile(r"\[\[\s?([A-Za-z])\s?\]\]")
_ANY = re.compile(rf"{_DENIED}{_ALONE}")
_LEAD_IN = re.compile(r"\banswer\s?(?:is\s?:?|:|=)", re.IGNORECASE)
_CHOICE_AFTER = re.compile(
  rf"[)\]]?\s?(?:(?:or|and|和|或)\s?|[/&,]\s?(?={_ALONE}\W{{0,3}}$))"
  rf"(?:option\s)?[(\[]?{_ALONE}"
)


def parse_choice(text: str, options: Sequence[str]) -> int | None:
  """Returns the index of the one option that a reply states; None for none or several.

  The rules apply in this order: a letter at the start, or one that the reply calls the
  answer; the text of an option, word by word; the only letter that stands by itself. A
  letter before the text of another option states neither.

  Args:
    text: The reply.
    options: Texts of the options without letters.
  """
  plain = clean_reply(text)
  stated = [*_STATED.finditer(plain)]
  if any(_CHOICE_AFTER.match(plain, match.end()) for match in stated):
    return None
  bare, first = _BARE.fullmatch(plain), _FIRST.match(plain)
  letters = {bare[1].upper()} if bare else {match[1].upper() for match in stated}
  letters |= {letter.upper() for letter in _BOXED.findall(plain)}
  if first:
    letters.add(first[1])
  texts = [_split_words(option) for option in options]
  if not letters:
    words = _split_words(_LEAD_IN.split(plain)[-1])
    letters = {x for x, t in zip(LETTERS, texts, strict=False) if t == words}
  elif first and _split_words(plain[first.end() :]) in texts:
    words = _split_words(plain[first.end() :])
    letters |= {x for x, t in zip(LETTERS, texts, strict=False) if t == words}
  letters = letters or {*_ANY.findall(plain)}
  index = LETTERS.index(next(iter(letters))) if len(letters) == 1 else len(options)
  return index if index < len(options) else None


def _split_words(text: str) -> list[str]:
  return re.findall(r"\w+", text.lower())
