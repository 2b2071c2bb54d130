"""Work ahead of its use: in a thread of this process, or in Grain's worker processes."""

import collections
import concurrent.futures
import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def prefetch(fetch: Callable[[int], T], steps: Iterable[int], ahead: int = 2) -> Iterator[T]:
    """Call `fetch` for each step, some calls ahead of their use, in a thread of its own.

    Args:
      fetch: a pure function of the step.
      steps: what to call it with, in order.
      ahead: how many results may wait; an error in one is raised when its turn comes.

    >>> list(prefetch(lambda step: 10 * step, range(3)))
    [0, 10, 20]
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting = collections.deque[concurrent.futures.Future[T]]()
        for step in steps:
            waiting.append(thread.submit(fetch, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_order(make: Callable[[S], T], items: Sequence[S], workers: int = 0) -> Iterator[T]:
    """`make` of each item, in their order: by so many worker processes, or, with 0, on demand.

    Args:
      make: a pure function that can be pickled, of and to what can be. It must not use JAX: the
        workers have no devices.
      items: what to call it with.
      workers: how many processes. An error in one is raised when its turn comes.

    Raises:
      ValueError: if there shall be workers and Grain, the extra `data`, is missing.

    >>> list(in_order(abs, [3, -2, 1]))
    [3, 2, 1]
    """
    check_workers(workers)
    return _by_grain(make, items, workers) if workers and items else map(make, items)


def _by_grain(make, items, workers):
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # Grain's workers want absl's flags, parsed
    made = (
        grain.MapDataset.source(items).map(make).to_iter_dataset(grain.ReadOptions(num_threads=0))
    )
    # By pipe: JAX may hold on to an array, and shared memory must be let go before the end.
    by_pipe = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    made = grain.experimental.WithOptionsIterDataset(made, by_pipe)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    with contextlib.closing(iter(made.mp_prefetch(options, worker_init_fn=_follow_parent))) as each:
        yield from each


def _follow_parent(*_):
    """In a worker: leave Ctrl-C to the parent, which yet saves its run, and die when it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    follow = lambda: (parent.join(), os._exit(1))
    threading.Thread(target=follow, daemon=True).start()


def check_workers(workers: int) -> None:
    """Raise a ValueError if there cannot be so many workers."""
    if workers < 0:
        raise ValueError(f"data.workers={workers}: must be at least 0")
    if workers and importlib.util.find_spec("grain") is None:
        raise ValueError(f"data.workers={workers}: needs Grain: pip install 'diffjax[data]'")
