"""Making things in a thread, ahead of their use."""

import concurrent.futures
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int = 1) -> Iterator[T]:
  """The items, `depth` of which are made by a thread while one is used.

  None of them may be None. The thread begins with the first item that is asked for.
  """
  source = iter(items)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting = deque(pool.submit(next, source, None) for _ in range(depth))
    try:
      while (item := waiting.popleft().result()) is not None:
        waiting.append(pool.submit(next, source, None))
        yield item
    finally:
      pool.shutdown(cancel_futures=True)
