"""Prefetching, in a thread of this process, or in Grain's worker processes."""

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

from ..extras import install

S = TypeVar("S")
T = TypeVar("T")


def prefetch(fetch: Callable[[int], T], steps: Iterable[int], ahead: int = 2) -> Iterator[T]:
    """Call `fetch` for each step in a background thread, ahead of the use of its results.

    Args:
      fetch: a pure function of the step.
      steps: the steps, in order.
      ahead: number of results that may wait; an error in a call is raised in place of its result.

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
    """Apply `make` to each item, in order, in worker processes, or on demand if `workers` is 0.

    Args:
      make: a pure function; it, its arguments and its results can be pickled. It must not use JAX,
        because the workers have no devices.
      items: the arguments.
      workers: number of processes. An error in a call is raised in place of its result.

    Raises:
      ValueError: if `workers` is positive and Grain, the extra `data`, is not installed.

    >>> list(in_order(abs, [3, -2, 1]))
    [3, 2, 1]
    """
    check_workers(workers)
    return _by_grain(make, items, workers) if workers and items else map(make, items)


def _by_grain(make, items, workers):
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # Grain's workers require that absl's flags are parsed
    made = (
        grain.MapDataset.source(items).map(make).to_iter_dataset(grain.ReadOptions(num_threads=0))
    )
    # Results are sent through pipes: JAX may keep an array alive, and shared memory must be
    # released before the process ends.
    by_pipe = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    made = grain.experimental.WithOptionsIterDataset(made, by_pipe)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    with contextlib.closing(iter(made.mp_prefetch(options, worker_init_fn=_follow_parent))) as each:
        yield from each


def _follow_parent(*_):
    """In a worker: leave Ctrl-C to the parent, which then saves its run, and exit when it exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    follow = lambda: (parent.join(), os._exit(1))
    threading.Thread(target=follow, daemon=True).start()


def check_workers(workers: int) -> None:
    """Raise a ValueError if `workers` is negative, or positive while Grain is not installed."""
    if workers < 0:
        raise ValueError(f"data.workers={workers}: must be at least 0")
    if workers and importlib.util.find_spec("grain") is None:
        raise ValueError(f"data.workers={workers}: needs Grain: {install('data')}")
