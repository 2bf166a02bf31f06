"""Reads questions with options in the layouts that benchmarks publish.

Video-MME, MVBench, NExT-QA, EgoSchema, Perception Test, TempCompass, LongVideoBench and
MLVU differ in the names of their fields, in whether options have letters, and in
whether the answer is a letter, a text or an index from 0.
"""

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlmrlaif_jax.data.time_range import add_time_range
from vlmrlaif_jax.evals.question_files import QUESTION_KEYS, get_text, is_empty
from vlmrlaif_jax.feedback.replies.options import LETTERS

_LIST_KEYS = ("options", "candidates", "option")
# Fields with one option each: NExT-QA, EgoSchema, and tables with a column per letter.
COLUMN_KEYS = (
  tuple(f"a{i}" for i in range(10)),
  tuple(f"option {i}" for i in range(10)),
  tuple(f"option_{i}" for i in range(10)),
  tuple(LETTERS[:10]),
)
INDEX_KEYS = ("answer_id", "correct_choice")  # Fields with an index from 0.
SEPARATORS = ".):]】、"  # Characters after the letter of an option.
# A letter, a character after it, and a text. "D.C. is shown" has none.
_LETTERED = re.compile(r"\W*(\w)\s*([^\w\s])(?!\w\.)\s*(.+)", re.DOTALL)
_LETTER = re.compile(r"[\W_]*([A-Za-z])[\W_]*")


class Choice(NamedTuple):
  """A question with its options."""

  question: str
  options: tuple[str, ...]  # Texts without letters.
  answer: int  # Index of the right option.


def read_choice(row: Mapping[str, Any], answer: Any = None) -> Choice:
  """Returns the question, the options and the right answer of a row.

  Args:
    row: A row without empty cells.
    answer: The answer of another file; None for that of the row.

  Raises:
    ValueError: The row has no readable options or answer.
  """
  question = get_text(row, QUESTION_KEYS)
  options, has_columns = _list_options(row)
  if not options:
    question, options = _split_question(question)
  texts, has_letters = _strip_letters(options)
  if len(texts) < 2 or len(texts) > len(LETTERS):
    raise ValueError(f"it must have two or more options, got {options!r}"[:200])
  if answer is None:
    keys = [key for key in ("answer", *INDEX_KEYS) if key in row]
    if not keys:
      raise ValueError('it has no "answer"')
    answer, has_columns = row[keys[0]], has_columns or keys[0] in INDEX_KEYS
  index = _find_answer(answer, texts, has_letters=has_letters, is_index=has_columns)
  return Choice(question, texts, index)


def add_row_range(path: str, row: Mapping[str, Any]) -> str:
  """Returns the name of the part of a video that a row's start and end limit.

  Raises:
    ValueError: A limit is no number, or the part is empty.
  """
  limits = []
  for key in ("start", "end"):
    value = row.get(key)
    try:
      limits.append(None if value is None else float(value))
    except (TypeError, ValueError):
      raise ValueError(f"{key} must be seconds, got {value!r}"[:200]) from None
  return add_time_range(path, *limits)


def _list_options(row: Mapping[str, Any]) -> tuple[list[str], bool]:
  """Returns the options, and whether each has a field of its own."""
  key = next((key for key in _LIST_KEYS if isinstance(row.get(key), list)), None)
  if key:
    options = row[key]
    while options and is_empty(options[-1]):  # Tables pad short lists.
      options = options[:-1]
    if any(is_empty(option) for option in options):
      raise ValueError(f"an option is empty in {options!r}"[:200])
    return [get_text({key: option}, (key,)) for option in options], False
  for names in COLUMN_KEYS:
    present = [name for name in names if name in row]
    if len(present) > 1 and present == list(names[: len(present)]):
      return [get_text(row, (name,)) for name in present], names[0] != "A"
  return [], False


def _split_question(text: str) -> tuple[str, list[str]]:
  """Splits a question from the lines with its options, as in TempCompass."""
  lines = text.splitlines()
  is_option = [split_letter(line) is not None for line in lines]
  first = is_option.index(True) if any(is_option) else len(lines)
  if not all(is_option[first:]) or not first:
    return text, []
  return "\n".join(lines[:first]), lines[first:]


def _strip_letters(options: Sequence[str]) -> tuple[tuple[str, ...], bool]:
  """Returns the texts of options without letters, and whether they had letters.

  Raises:
    ValueError: Some options have letters, or the letters are not A, B, C, ...
  """
  split = [split_letter(option) for option in options]
  if not any(split):
    return tuple(option.strip() for option in options), False
  if [each and each[0] for each in split] != list(LETTERS[: len(options)]):
    raise ValueError(
      f'options must be ["A. ...", "B. ...", ...] or have no letters, got {options!r}'
    )
  return tuple(each[1] for each in split if each), True


def split_letter(option: str) -> tuple[str, str] | None:
  """Splits an option into its letter and its text; None without a letter.

  >>> split_letter(" (B) blue ")
  ('B', 'blue')
  """
  match = _LETTERED.fullmatch(option)
  if not match:
    return None
  # Full-width letters and brackets become ASCII.
  letter, mark = (unicodedata.normalize("NFKC", match[i]) for i in (1, 2))
  is_letter = letter in LETTERS and mark in SEPARATORS
  return (letter, match[3].strip()) if is_letter else None


def _find_answer(
  answer: Any, texts: Sequence[str], *, has_letters: bool, is_index: bool
) -> int:
  """Returns the index of the right option.

  Args:
    answer: A letter such as "B", "(B)" or "B. red", the text of an option, or an index.
    texts: Texts of the options.
    has_letters: Whether the options have letters, which then precede texts.
    is_index: Whether a text of digits is an index.

  Raises:
    ValueError: The answer is no option.
  """
  text = get_text({"answer": answer}, ("answer",)) if not is_empty(answer) else ""
  plain = unicodedata.normalize("NFKC", text)
  number = int(plain) if plain.isdecimal() else None
  if number is not None and (is_index or not isinstance(answer, str)):
    indices = [number]
  else:
    same = [i for i, each in enumerate(texts) if _fold(each) == _fold(text)]
    bare = _LETTER.fullmatch(plain)
    lettered = split_letter(text)
    letters = [LETTERS.index(match[1].upper()) for match in [bare] if match]
    if lettered and not bare:
      index = LETTERS.index(lettered[0])
      is_same = index < len(texts) and _fold(texts[index]) == _fold(lettered[1])
      letters += [index] if is_same else []
    numbers = [number] if number is not None else []
    order = (letters, same, numbers) if has_letters else (same, letters, numbers)
    indices = list(itertools.chain(*order))[:1]
  if not indices or indices[0] >= len(texts):
    raise ValueError(
      f"answer must be one of {LETTERS[: len(texts)]}, an index from 0, or the text of "
      f"an option, got {answer!r}"
    )
  return indices[0]


def _fold(text: str) -> str:
  return " ".join(text.split()).rstrip(".").casefold()
