"""Errors that a user can correct, and checks of settings that raise them."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from ml_collections import ConfigDict

Settings: TypeAlias = ConfigDict | Mapping[str, Any]

# Control characters other than tab and newline, and halves of surrogate pairs.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
EXIT_USER_ERROR = 2  # Exit code of a program after a UserError.


class UserError(Exception):
  """An error in the user's settings, files or devices.

  The message names the setting or file, its value and the remedy. Programs print the
  message without a traceback and exit with EXIT_USER_ERROR.
  """


class ResumableError(UserError):
  """An error after which the same command resumes the run."""


PLACE_NOTE = "In "  # Start of a note about the place of an error.


@contextmanager
def note_place(place: str) -> Iterator[None]:
  """Adds a place, as "step 3", to the notes of an error of the block."""
  try:
    yield
  except Exception as error:
    error.add_note(f"{PLACE_NOTE}{place}")
    raise


def iterate_causes(error: BaseException) -> Iterator[BaseException]:
  """Yields an error, its causes and the errors that it was raised during."""
  todo: list[BaseException | None] = [error]
  seen: set[int] = set()
  while todo:
    each = todo.pop(0)
    if each is not None and id(each) not in seen:
      seen.add(id(each))
      yield each
      parts = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
      todo += [*parts, each.__cause__, each.__context__]


def list_places(error: BaseException) -> list[str]:
  """Returns the places that `note_place` has added, the outermost first.

  >>> try:
  ...   with note_place("step 3"), note_place("update"):
  ...     raise MemoryError
  ... except MemoryError as error:
  ...   list_places(error)
  ['step 3', 'update']
  """
  places: list[str] = []
  for each in iterate_causes(error):
    notes = reversed(each.__dict__.get("__notes__", ()))
    places += [n.removeprefix(PLACE_NOTE) for n in notes if n.startswith(PLACE_NOTE)]
  return places


def make_printable(text: str) -> str:
  r"""Returns a text whose control characters and lone surrogates are escaped.

  Texts of data files, servers and models could control a terminal, or fail to print.

  >>> print(make_printable("id \x1b[2J"))
  id \x1b[2J
  """
  return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def check_choices(config: Settings, choices: Mapping[str, Collection[Any]]) -> None:
  """Checks settings that allow only certain values.

  Args:
    config: A section of a config. A setting may be a tuple of allowed values.
    choices: The allowed values by the setting's name within the section.

  Raises:
    ValueError: A value is not allowed. The message starts with the setting's name.
  """
  for name, allowed in choices.items():
    value = config[name]
    values = value if isinstance(value, tuple) else (value,)
    wrong = [each for each in values if each not in allowed]
    if wrong:
      raise ValueError(
        f"{name} must be one of {', '.join(map(str, allowed))}, not {wrong[0]!r}"
      )


def check_at_least(config: Settings, bounds: Mapping[str, float | int]) -> None:
  """Checks settings that have a smallest value.

  Args:
    config: A section of a config.
    bounds: The smallest allowed values by the setting's name within the section.

  Raises:
    ValueError: A value is too small. The message starts with the setting's name.
  """
  for name, least in bounds.items():
    if config[name] < least:
      raise ValueError(f"{name} must be {least} or more, not {config[name]}")


@contextmanager
def subsection(name: str) -> Iterator[None]:
  """Prefixes the setting's name in the message of a ValueError with a subsection's."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{name}.{error}") from error


@contextmanager
def user_errors(section: str) -> Iterator[None]:
  """Turns a ValueError about a section's setting into a UserError that names the flag.

  Args:
    section: The dotted path that precedes the setting's name in the flag.

  Raises:
    UserError: The body raised a ValueError whose message starts with a setting's name.
  """
  try:
    yield
  except ValueError as error:
    raise UserError(f"--config.{section}.{error}") from error
