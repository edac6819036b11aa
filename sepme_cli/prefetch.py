"""Computing what is needed next while what is there is used."""

import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

_AHEAD = 4
"""How many results wait at most: tensors are tens of megabytes."""


def ahead(makers: Iterable[Callable[[], Result]]) -> Generator[Result]:
    """What each maker makes, in order, made side by side: numpy lets other threads in meanwhile.

    Raises what a maker raises, in its place; what is then under way is waited for.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        waiting: list[Future[Result]] = []
        try:
            for make in makers:
                waiting.append(pool.submit(make))
                if len(waiting) > _AHEAD:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            pool.shutdown(cancel_futures=True)
