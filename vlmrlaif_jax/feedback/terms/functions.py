"""Loads the functions of reward terms and calls them on samples.

A function that fails for a sample makes this sample invalid, and no other.
"""

import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
import pathlib
import queue
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vlmrlaif_jax.core import distributed
from vlmrlaif_jax.feedback.terms.sample import Sample


class Limits(NamedTuple):
  """Limits of the calls of functions."""

  concurrency: int  # Calls of an async function in flight, per process.
  timeout_s: float  # Seconds of a call.


class Outcome(NamedTuple):
  """The value of a sample, or the reason for a missing one."""

  value: float | None
  failure: str = ""  # Traceback or reason; "" with a value.


# Loading.


def load_function(
  text: str, builtin: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
  """Returns the function that the setting `fn` names.

  Args:
    text: A path and a name, a module and a name, or the name of a built-in function.
    builtin: Built-in functions by name.

  Raises:
    ValueError: There is no such function. The message starts with "fn".
  """
  if text in builtin:
    return builtin[text]
  place, _, name = text.rpartition(":")
  if not place or not name:
    raise ValueError(
      f'fn must be "FILE.py:FUNCTION", "PACKAGE.MODULE:FUNCTION" or one of '
      f"{', '.join(builtin)}, not {text!r}"
    )
  try:
    load = _import_file if place.endswith(".py") else importlib.import_module
    module = load(place)
  except Exception as error:
    reason = f"{type(error).__name__}: {error}"
    raise ValueError(
      f"fn={text!r}: {place} cannot be imported ({reason}); correct its code, or give "
      f"its path from {pathlib.Path.cwd()}"
    ) from error
  if name not in vars(module):
    raise ValueError(f"fn={text!r}: {place} defines no {name!r}; correct the name")
  function = vars(module)[name]
  if not callable(function):
    kind = type(function).__name__
    raise ValueError(f"fn={text!r}: it is a {kind}; give the name of a function")
  return function


def find_function_file(text: str) -> pathlib.Path | None:
  """Returns the file of a function that `fn` names by path; None for others."""
  place, _, name = text.rpartition(":")
  return pathlib.Path(place) if name and place.endswith(".py") else None


def _import_file(place: str) -> Any:
  path = pathlib.Path(place).resolve()
  spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def bind_arguments(
  function: Callable[..., Any], text: str, kwargs: Mapping[str, Any]
) -> Callable[[Sequence[Sample]], Any]:
  """Returns a function of samples alone, with the keyword arguments of a term.

  Raises:
    ValueError: The function does not accept samples and these arguments. The message
      starts with "fn".
  """
  try:
    inspect.signature(function).bind([], **kwargs)
  except TypeError as error:
    raise ValueError(
      f"fn={text!r}: it must accept (samples{''.join(f', {k}=' for k in kwargs)}), but "
      f"{error}; change the function, or the kwargs of the term"
    ) from error
  return functools.partial(function, **kwargs)


# Calls.


def call_function(
  function: Callable[[Sequence[Sample]], Any],
  samples: Sequence[Sample],
  limits: Limits,
) -> list[Outcome]:
  """Returns the outcome of each sample. Every process must call it.

  Each process calls the function for a part of the samples. An async function is called
  for each sample by itself. Another function is called once for all samples, and again
  for each sample if that fails.
  """
  if inspect.iscoroutinefunction(function):
    call = lambda part: asyncio.run(_call_async(function, part, limits))
  else:
    call = lambda part: _call_sync(function, part, limits)
  rows = distributed.map_across_processes(call, samples)
  return [Outcome(*row) for row in rows]


async def _call_async(
  function: Callable[[Sequence[Sample]], Any],
  samples: Sequence[Sample],
  limits: Limits,
) -> list[Outcome]:
  slots = asyncio.Semaphore(limits.concurrency)

  async def call(sample: Sample) -> Outcome:
    async with slots:
      try:
        async with asyncio.timeout(limits.timeout_s):
          return read_values(await function([sample]), 1)[0]
      except TimeoutError:
        return Outcome(None, _format_timeout(limits))
      except Exception:
        return Outcome(None, traceback.format_exc())

  return await asyncio.gather(*map(call, samples))


def _call_sync(
  function: Callable[[Sequence[Sample]], Any],
  samples: Sequence[Sample],
  limits: Limits,
) -> list[Outcome]:
  """Calls a function for all samples, and for each by itself if that raises."""
  if not samples:
    return []
  outcomes = _call_in_thread(function, samples, limits)
  failure = outcomes[0].failure
  if len(samples) == 1 or not failure.startswith("Traceback"):
    return outcomes
  return [_call_in_thread(function, [each], limits)[0] for each in samples]


def _call_in_thread(
  function: Callable[[Sequence[Sample]], Any],
  samples: Sequence[Sample],
  limits: Limits,
) -> list[Outcome]:
  """Calls a function in a thread of its own, which ends with this process."""
  results: queue.SimpleQueue[list[Outcome]] = queue.SimpleQueue()

  def work() -> None:
    try:
      outcomes = read_values(function(samples), len(samples))
    except Exception:
      outcomes = [Outcome(None, traceback.format_exc())] * len(samples)
    results.put(outcomes)

  threading.Thread(target=work, daemon=True).start()
  try:
    return results.get(timeout=limits.timeout_s)
  except queue.Empty:
    return [Outcome(None, _format_timeout(limits))] * len(samples)


def _format_timeout(limits: Limits) -> str:
  return (
    f"no result within reward.timeout_s={limits.timeout_s} s: raise it, or lower "
    f"reward.concurrency={limits.concurrency}"
  )


def read_values(result: Any, count: int) -> list[Outcome]:
  """Returns the outcomes that a function returned.

  Raises:
    TypeError: The function did not return a number, None or an outcome for each sample.
  """
  if len(result) != count:
    raise TypeError(f"it returned {len(result)} values for {count} samples")
  return [_read_value(value) for value in result]


def _read_value(value: Any) -> Outcome:
  if isinstance(value, Outcome):
    return value
  if value is None:
    return Outcome(None, "it returned None")
  number = float(value)
  return (
    Outcome(number) if math.isfinite(number) else Outcome(None, f"it returned {number}")
  )
