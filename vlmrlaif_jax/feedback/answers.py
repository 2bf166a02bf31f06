r"""Compares responses with reference answers: text, numbers, options and boxes.

`ANSWER_MEASURES` lists the comparisons of a response, a reference answer and the
question. They read the last `\boxed{...}` or the `<answer>` tag of a response if it has
one.
"""

import collections
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction

from vlmrlaif_jax.feedback.replies.cleaning import extract_answer
from vlmrlaif_jax.feedback.replies.options import LETTERS, parse_choice, parse_yes_no

TOLERANCE = 1e-6  # Largest difference of two equal numbers, relative to the reference.
_NUMBER_WORDS = (
  *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
  *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
  *("seventeen", "eighteen", "nineteen", "twenty"),
)
_WORD_VALUES = {word: Fraction(value) for value, word in enumerate(_NUMBER_WORDS)}
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[-+]?\d{1,3})?")
_RATIO = re.compile(r"([-+]?\d+) ?/ ?(\d+)")
_LATEX_RATIO = re.compile(r"([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = re.compile(rf"[{re.escape(string.punctuation)}]")
_OPTION = re.compile(r"[ \t]*\(?([A-Z])[.):\]] *(\S.*)")


def is_match(response: str, answer: str, question: str = "") -> bool:
  r"""Returns whether a response gives the reference answer.

  Options in the question's lines are compared by letter or by text. Otherwise numbers
  are compared as numbers, yes or no by the first word, and other texts by
  `normalize_text`.

  >>> is_match("The answer is (B).", "red", "What color?\nA. blue\nB. red")
  True
  >>> is_match("1,000.0", "1000"), is_match("A dog!", "the dog")
  (True, True)
  """
  final = extract_final(response)
  options = list_options(question)
  right = find_option(answer, options)
  if right is None and re.fullmatch(r"\(?[A-Z]\)?\.?", answer.strip()):
    # The options are not in the question, so only the letter is compared.
    right = LETTERS.index(answer.strip(" ()."))
    options = [f"option {letter}" for letter in LETTERS]
  if right is not None:
    choice = parse_choice(final, options)
    return right == (find_option(final, options) if choice is None else choice)
  expected = parse_number(answer)
  if expected is not None:
    stated = parse_number(final)
    return stated is not None and is_same_number(stated, expected)
  if normalize_text(answer) in ("yes", "no"):
    return parse_yes_no(final) == (normalize_text(answer) == "yes")
  return normalize_text(final) == normalize_text(answer)


def is_boxed_match(response: str, answer: str, question: str = "") -> bool:
  r"""Returns whether the last `\boxed{...}` of a response has the reference answer.

  >>> is_boxed_match(r"It is \boxed{\frac{1}{2}}.", "0.5"), is_boxed_match("0.5", "0.5")
  (True, False)
  """
  boxed = extract_boxed(response)
  return boxed is not None and is_match(boxed, answer, question)


def compute_f1(response: str, answer: str, question: str = "") -> float:
  """Computes the F1 of the words of a response, as SQuAD (1606.05250) does.

    2 * shared / (words of the response + words of the answer)

  >>> compute_f1("a red ball", "the red car")
  0.5
  """
  words = [normalize_text(text).split() for text in (extract_final(response), answer)]
  first, second = map(collections.Counter, words)
  total = first.total() + second.total()
  return 2 * (first & second).total() / total if total else 1.0


# Comparisons of a response, its reference answer and the question.
ANSWER_MEASURES: dict[str, Callable[[str, str, str], float]] = {
  "match": is_match,
  "boxed": is_boxed_match,
  "f1": compute_f1,
}


# Parts of a response.


def extract_final(response: str) -> str:
  """Returns the last boxed text, or the text of an answer tag, or all but thoughts."""
  boxed = extract_boxed(response)
  return (extract_answer(response) if boxed is None else boxed).strip()


def extract_boxed(text: str) -> str | None:
  r"""Returns the content of the last `\boxed{...}`; None without a complete one.

  >>> print(extract_boxed(r"\boxed{1} and \boxed{\frac{3}{4}}"))
  \frac{3}{4}
  """
  for start in reversed([match.end() for match in re.finditer(r"\\f?boxed ?\{", text)]):
    depth = 1
    for place in range(start, len(text)):
      depth += {"{": 1, "}": -1}.get(text[place], 0)
      if not depth:
        return text[start:place].strip()
  return None


# Text and numbers.


def normalize_text(text: str) -> str:
  """Returns a text in lower case, without articles, punctuation and outer space.

  >>> normalize_text(" The  Red ball. ")
  'red ball'
  """
  plain = unicodedata.normalize("NFKC", text).casefold()
  return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", plain)).split())


def parse_number(text: str) -> Fraction | None:
  r"""Returns the number that a whole text states; None for another text.

  It reads digits, ratios, `\frac`, per cents and the words from zero to twenty.

  >>> parse_number("1,250"), parse_number("-3/4"), parse_number("three dogs")
  (Fraction(1250, 1), Fraction(-3, 4), None)
  """
  plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip().casefold()
  plain = plain.strip("$").rstrip(".").strip()
  is_share = plain.endswith("%")
  plain = plain.removesuffix("%").removesuffix("\\").strip()
  if plain in _WORD_VALUES:
    return _WORD_VALUES[plain]
  if match := _LATEX_RATIO.fullmatch(plain):
    plain = f"{match[1]}{match[2]}/{match[3]}"
  if match := _RATIO.fullmatch(plain):
    return Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
  if not _NUMBER.fullmatch(plain) or not plain.strip("+-.")[:1].isdigit():
    return None
  value = Fraction(plain.replace(",", ""))
  return value / 100 if is_share else value


def is_same_number(stated: Fraction, expected: Fraction) -> bool:
  """Returns whether two numbers are equal within TOLERANCE."""
  return abs(stated - expected) <= TOLERANCE * abs(expected)


# Options.


def list_options(question: str) -> list[str]:
  r"""Returns the texts of the options in a question's last lines; [] without options.

  >>> list_options("Which one?\nA. red\n(B) blue")
  ['red', 'blue']
  """
  matches = [_OPTION.fullmatch(line) for line in question.splitlines() if line.strip()]
  stated = [match for match in matches if match]
  letters = "".join(match[1] for match in stated)
  is_list = len(stated) > 1 and letters == LETTERS[: len(stated)]
  return [match[2].strip() for match in stated] if is_list else []


def find_option(answer: str, options: Sequence[str]) -> int | None:
  """Returns the index of the option that a reference answer names; None for none."""
  texts = [normalize_text(option) for option in options]
  plain = answer.strip()
  if match := re.fullmatch(r"\(?([A-Z])(?:[.):](.*)|)", plain, re.DOTALL):
    index, rest = LETTERS.index(match[1]), normalize_text(match[2] or "")
    if index < len(options) and rest in ("", texts[index]):
      return index
  named = [i for i, text in enumerate(texts) if text == normalize_text(plain)]
  return named[0] if len(named) == 1 else None
