"""Making things ahead: how far, in which order, and what becomes of errors."""

import threading

import pytest

from vlmrlaif_jax.core.prefetch import prefetch


@pytest.mark.parametrize("depth", [1, 2])
def test_so_many_are_made_while_one_is_used(depth):
  begun = [threading.Event() for _ in range(4)]
  made = prefetch((begun[i].set() or i for i in range(4)), depth)
  assert next(made) == 0
  assert begun[depth].wait(timeout=10) and not begun[depth + 1].is_set()
  assert list(made) == [1, 2, 3]


def test_there_may_be_nothing_to_make():
  assert list(prefetch([])) == []


def test_an_error_in_making_one_reaches_the_caller():
  def make(step):
    if step == 1:
      raise ValueError("no such row")
    return step

  made = prefetch(map(make, range(3)))
  assert next(made) == 0
  with pytest.raises(ValueError, match="no such row"):
    next(made)


def test_no_more_are_made_once_nobody_asks():
  seen = []
  made = prefetch((seen.append(i) or i for i in range(100)), depth=3)
  next(made)
  made.close()
  assert len(seen) <= 4
