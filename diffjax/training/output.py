"""Standard output that never stops a run: what cannot be printed is dropped."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Tolerant:
    """A stream like another; once that refuses a write, all later output goes nowhere.

    The disk of a log may be full, or the reader of a pipe may have ended, as `| head` does.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is buffered."""
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # The stream keeps what it could not write, and Python flushes it again at its end.
            with contextlib.suppress(OSError, io.UnsupportedOperation):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def tolerated() -> Iterator[None]:
    """Drop what standard output and standard error refuse, and escape characters they lack."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Tolerant(before[0]), Tolerant(before[1])
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
