"""Prefetching of an iterator in a background thread."""

import concurrent.futures
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int = 1) -> Iterator[T]:
  """Yields items that a background thread computes ahead of their use.

  Args:
    items: Items, none of which may be None. The thread starts with the first request.
    depth: Number of items computed ahead.
  """
  source = iter(items)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    pending = deque(pool.submit(next, source, None) for _ in range(depth))
    try:
      while (item := pending.popleft().result()) is not None:
        pending.append(pool.submit(next, source, None))
        yield item
    finally:
      pool.shutdown(cancel_futures=True)
