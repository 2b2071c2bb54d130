"""Recording a run: rows in `metrics.jsonl`, lines on the terminal, pictures, and other writers.

`Recorder` composes three small pieces: a file of rows, which are kept while the disk is full
(`Appender`); the terminal (`Terminal`); and the writers, of which one that fails is dropped
(`Writers`). None of them stops training.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL.Image import Image
from rich.console import Console
from rich.live import Live
from rich.text import Text

from . import metrics
from .files import replacing, write_text
from .metrics import Window
from .mirror import Mirror
from .telemetry import Meter
from .writers import WRITERS, Writer


class Appender:
    """Appends bytes to a file; what a full disk refuses is kept, and appended with the next.

    Args:
      path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting = b""

    def append(self, line: bytes) -> None:
        """Append a line and all that waits.

        Raises:
          OSError: if the disk takes only a part. The file then ends at a whole line.
        """
        self.waiting += line
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(self.waiting) != len(self.waiting):
                file.truncate(end)
                raise OSError(f"{self.path}: no space left; rows are kept until there is")
        self.waiting = b""


WIDTH = 100
"""Columns that a line of metrics has at most, so that it does not wrap."""


class Terminal:
    """Lines that stay, and below them, on a terminal, a line of what is being done.

    Args:
      quiet: print nothing, as in all processes but the first.
    """

    def __init__(self, quiet: bool) -> None:
        self._console = Console(quiet=quiet)
        self._live = Live(console=self._console, transient=True)

    def __enter__(self) -> "Terminal":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, text: str) -> None:
        """Replace the last line of a terminal; elsewhere, print nothing."""
        if self._live.is_started:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"))


class Writers:
    """The writers that a run asked for. One that fails gets nothing more, and a line says so.

    Args:
      names: in `WRITERS`.
      say: prints a line.
    """

    def __init__(self, names: Sequence[str], say: Callable[[str], None]) -> None:
        self._names, self._say = names, say
        self._open: dict[str, Writer] = {}

    def open(self, workdir: Path, step: int) -> None:
        """Open all of them, for a run that starts at `step`."""
        for name in self._names:
            with self._dropping(name):
                self._open[name] = WRITERS[name].open(workdir, step)

    def each(self, use: Callable[[Writer], Any]) -> None:
        """Call `use` on every writer that is open."""
        for name, writer in list(self._open.items()):
            with self._dropping(name):
                use(writer)

    @contextlib.contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # other packages may raise anything
            self._open.pop(name, None)
            self._say(f"{name} gets no more of this run: {error}")


class Recorder:
    """Records what a run reports; use as a context manager.

    Rows are on disk as soon as they are written, or, on a full disk, when it has space again; on a
    store within half a minute (`mirror.EVERY`). Of several processes only the first records
    anything.

    Args:
      workdir: the run's directory.
      step: the step at which the run starts; rows of later steps, of a run that was cut off, are
        removed.
      steps: the step at which the run ends, for the time that is left.
      writers: names in `WRITERS`, which also get the rows and pictures.
      moved: folders of files that are written once, for `Mirror`.
      hold: called before each upload, for `Mirror`.

    Attributes:
      folder: where this process writes what is not a checkpoint: the run's directory, or, if that
        is on a store, a folder whose files are uploaded to it in the background.
      skipped: the number of batches that the rows report as skipped.
      meter: measures what the run spends; each row includes its reading.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        steps: int,
        writers: Sequence[str] = (),
        moved: tuple[str, ...] = (),
        hold: Callable[[], None] = lambda: None,
    ) -> None:
        self.steps = steps
        self.first = jax.process_index() == 0
        self.terminal = Terminal(quiet=not self.first)
        self.writers = Writers(writers if self.first else (), self.say)
        self.mirror = Mirror(workdir, self.say, moved, hold, active=self.first)
        self.folder = self.mirror.folder
        self.rows = Appender(self.folder / metrics.ROWS)
        self.meter = Meter()
        self.began = self.at = step, time.perf_counter()
        rows = [row for row in metrics.read(workdir) if row["step"] <= step]
        self.skipped = sum(row.get("skipped", 0) for row in rows)
        if self.first:
            write_text(self.rows.path, "".join(json.dumps(row) + "\n" for row in rows))

    def __enter__(self) -> "Recorder":
        self.meter.__enter__()
        self.writers.open(self.folder, self.began[0])
        self.terminal.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.rows.waiting:
            self.attempt(self.rows.append, b"")
        self.writers.each(lambda writer: writer.close())
        self.mirror.close()
        self.terminal.__exit__()
        self.meter.__exit__()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.terminal.say(text)

    def show(self, step: int) -> None:
        """Show how many steps the host has started, on a terminal's last line."""
        self.terminal.show(f"step {step}/{self.steps} ...")

    def write(self, step: int, batch_size: int, **values: Any) -> None:
        """Write a row: the metrics given, and the speed since the row before."""
        # If no step was made since `start`, the speed is measured from the run's beginning.
        last_step, last_time = self.at if step > self.at[0] else self.began
        self.at = step, now = step, time.perf_counter()
        speed = (step - last_step) / (now - last_time)
        spent = self.meter.read(step - last_step, now - last_time)
        rate = {"img_per_s": speed * batch_size}
        row = {"step": step, **values, **rate}
        self.skipped += int(values.get("skipped", 0))
        self.attempt(self.rows.append, json.dumps(row | spent).encode() + b"\n")
        self.writers.each(lambda writer: writer.row(row | spent))
        shown = metrics.numbers(rate | values)
        left = f"{_clock((self.steps - step) / speed)} left"
        self.say(_line(f"step {step}/{self.steps}", shown, left))

    def start(self, step: int) -> None:
        """Measure the speed of the next row from here, so that it leaves out what came before."""
        self.at = step, time.perf_counter()
        self.meter.start()

    def check_finite(
        self, window: Window, step: int, allowed: int, describe: Callable[[int], str]
    ) -> None:
        """Report each step of a window with infinite or undefined metrics.

        Args:
          window: metrics of consecutive steps.
          step: steps taken when the last of them was made.
          allowed: how many such steps a run may have.
          describe: more about a step, given the number of steps taken before it.

        Raises:
          FloatingPointError: if there are more; names the step, and adds what `describe` returns.
        """
        found = metrics.find_nonfinite(window, step)
        for count, (taken, why) in enumerate(found, self.skipped + 1):
            line = f"{why} at step {taken + 1}; {describe(taken)}"
            if count > allowed:
                raise FloatingPointError(line)
            self.say(f"skipped {count} of {allowed}: {line}")

    def attempt(self, write: Callable[..., Any], *args: Any) -> None:
        """Call `write(*args)`, in the first process, for a file that the run does not depend on.

        A full disk or a package that is not installed costs one line.
        """
        if self.first:
            try:
                write(*args)
            except (OSError, ModuleNotFoundError) as error:
                self.say(f"not written: {error}")

    def picture(self, step: int, name: str, draw: Callable[..., Image], *args: Any) -> None:
        """Save the picture `draw(*args)` as NAME.png, and give it to the writers.

        Args:
          step: steps taken.
          name: of the picture.
          draw: makes it, in the first process only. A ValueError, of samples that are no images,
            costs one line.
          args: of `draw`.
        """

        def write():
            try:
                image = draw(*args)
            except ValueError as error:
                self.say(f"no picture {name}.png ({error})")
                return
            self.writers.each(lambda writer: writer.picture(step, f"pictures/{name}", image))
            with replacing(self.folder / f"{name}.png") as new:
                image.save(new, format="PNG")

        self.attempt(write)


def _line(step, numbers, left):
    """A line of metrics: the step, losses, the time that is left, and what there is room for."""
    losses = {name: value for name, value in numbers.items() if name.endswith("loss")}
    line = "  ".join([step, *_words(losses), left])
    for word in _words({name: value for name, value in numbers.items() if name not in losses}):
        longer = f"{line}  {word}"
        line = longer if len(longer) <= WIDTH else line
    return line


def _words(numbers):
    return [f"{name} {value:.4g}" for name, value in numbers.items()]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
