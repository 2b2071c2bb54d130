"""What a run says of itself: rows of `metrics.jsonl`, and a line on the terminal.

A row has numbers, and the loss by noise level: `loss_by_log_snr`, the mean loss of the examples
whose times fell between two neighbours of `LOG_SNR_EDGES` (None if none did), and how many they
were, `count_by_log_snr`; both over all the steps since the row before.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL.Image import Image
from rich.console import Console
from rich.live import Live

from .files import write_text
from .telemetry import Meter
from .types import Array, Real
from .writers import WRITERS, Writer

ROWS = "metrics.jsonl"
WINDOW = "window.json"
LOG_SNR_EDGES = tuple(range(-12, 13))
"""Between which values of log-SNR a loss is counted; the outer bins take all that is beyond. The
same for every run, so that runs on different schedules compare."""


class Recorder:
    """Writes rows of metrics, and shows the newest: a live line on a terminal, else plain lines.

    Use as a context manager; rows are on disk as soon as they are written, or, if the disk is full,
    when it takes them. Of many processes only the first writes and shows.

    Args:
      workdir: the run's directory.
      step: where the run starts; rows of later steps, of a run that was cut off, are dropped.
      steps: where it ends, for the time it still takes.
      title: what stands before every line.
      writers: names in `WRITERS`, of who else gets rows and pictures. One that fails is left out
        from there on, with a line that says so: a run can do without.

    Attributes:
      skipped: how many batches the rows say were left out.
      meter: what the run spends; each row has its reading.
    """

    def __init__(
        self, workdir: Path, step: int, steps: int, title: str = "", writers: Sequence[str] = ()
    ) -> None:
        self.path, self.steps, self.title = workdir / ROWS, steps, title
        self.first = jax.process_index() == 0
        self.console = Console(quiet=not self.first)
        self.live = Live(console=self.console)
        self.began = self.at = step, time.perf_counter()
        rows = [row for row in read(workdir) if row["step"] <= step]
        self.skipped = sum(row.get("skipped", 0) for row in rows)
        self.unwritten = b""
        self.meter = Meter()
        self.asked = writers if self.first else ()
        self.writers: dict[str, Writer] = {}
        if self.first:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def __enter__(self) -> "Recorder":
        self.meter.__enter__()
        for name in self.asked:
            with self._doing_without(name):
                self.writers[name] = WRITERS[name].open(self.path.parent, self.began[0])
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.unwritten:
            self.aside(self._append, b"")
        self._tell(lambda writer: writer.close())
        self.live.stop()
        self.meter.__exit__()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def write(self, step: int, batch_size: int, **metrics: Any) -> None:
        """Write a row: the metrics given, and the speed since the last one."""
        # A first row right after the start has the run's whole beginning to be measured by.
        last_step, last_time = self.at if step > self.at[0] else self.began
        self.at = step, now = step, time.perf_counter()
        speed = (step - last_step) / (now - last_time)
        spent = self.meter.read(step - last_step, now - last_time)
        row = {"step": step, **metrics, "img_per_s": speed * batch_size}
        left = f"  {_clock((self.steps - step) / speed)} left"
        self.skipped += int(metrics.get("skipped", 0))
        self.aside(self._append, json.dumps(row | spent).encode() + b"\n")
        self._tell(lambda writer: writer.row(numbers(row | spent)))
        shown = "  ".join(f"{k} {v:.4g}" for k, v in numbers(row).items() if k != "step")
        line = f"{self.title}step {step}/{self.steps}  {shown}{left}"
        if self.live.is_started:
            self.live.update(line)
        else:
            self.say(line)

    def start(self, step: int) -> None:
        """Measure the speed of the next row from here, so as to leave out what was before."""
        self.at = step, time.perf_counter()
        self.meter.start()

    def check(
        self, window: list[dict[str, Any]], step: int, allowed: int, describe: Callable[[int], str]
    ) -> None:
        """Report each step of infinite or undefined metrics, of those up to `step`.

        Args:
          window: metrics of consecutive steps, arrays.
          step: steps taken when the last of them was made.
          allowed: how many such steps a run may have.
          describe: what else to say of a step, given the number of steps taken before it.

        Raises:
          FloatingPointError: if there are more; names the step, and what `describe` says.
        """
        skipped = self.skipped
        rows = _fetched(window)
        for taken, row in enumerate(rows, step - len(rows)):
            bad = [f"{name} is {row[name]}" for name in _not_finite(row)]
            if bad:
                skipped += 1
                what = f"{', '.join(bad)} at step {taken + 1}; {describe(taken)}"
                if skipped > allowed:
                    raise FloatingPointError(what)
                self.say(f"left out {skipped} of {allowed}: {what}")

    def aside(self, write: Callable[..., Any], *args: Any) -> None:
        """Write, in the first process, a file that a run can do without.

        A full disk, or a package that is not there, is only told.

        Args:
          write: the function that writes it.
          args: its arguments.
        """
        if self.first:
            try:
                write(*args)
            except (OSError, ModuleNotFoundError) as error:
                self.say(f"not written: {error}")

    def picture(self, step: int, name: str, draw: Callable[..., Image], *args: Any) -> None:
        """Draw, in the first process, NAME.png, and show it to the writers.

        Args:
          step: steps taken.
          name: of the picture.
          draw: makes it.
          args: of `draw`.
        """

        def write():
            image = draw(*args)
            self._tell(lambda writer: writer.picture(step, f"pictures/{name}", image))
            image.save(self.path.with_name(f"{name}.png"))

        self.aside(write)

    def keep(self, step: int, window: list[dict[str, Any]]) -> None:
        """Keep the metrics of the steps since the last log point, for a run stopped between two."""
        text = json.dumps({"step": step, "window": _numbers(window)})
        self.aside(write_text, self.path.with_name(WINDOW), text + "\n")

    def _tell(self, what):
        for name, writer in list(self.writers.items()):
            with self._doing_without(name):
                what(writer)

    @contextlib.contextmanager
    def _doing_without(self, name):
        try:
            yield
        except Exception as error:  # whatever others' packages raise
            self.writers.pop(name, None)
            self.say(f"{name} gets no more of this run: {error}")

    def _append(self, line):
        self.unwritten += line
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(self.unwritten) != len(self.unwritten):
                file.truncate(end)  # no half lines
                raise OSError(f"{self.path}: no space left; its rows wait")
        self.unwritten = b""


def by_log_snr(
    log_snr: Float[Real, " batch"], losses: Float[Real, " batch"]
) -> Float[Array, "2 bins"]:
    """Sums of losses between neighbours of `LOG_SNR_EDGES`, and how many they are.

    Args:
      log_snr: of each example.
      losses: of each example.

    >>> by_log_snr(jnp.array([0.5, 0.0, -99.0]), jnp.array([1.0, 2.0, 4.0]))[:, jnp.array([0, 12])]
    Array([[4., 3.],
           [1., 2.]], dtype=float32)
    """
    inner = jnp.asarray(LOG_SNR_EDGES[1:-1], log_snr.dtype)
    which = jnp.searchsorted(inner, log_snr, side="right")
    here = which[:, None] == jnp.arange(len(LOG_SNR_EDGES) - 1)[None]
    sums = jnp.where(here, losses[:, None], 0).sum(0)
    return jnp.stack([sums, here.sum(0).astype(sums.dtype)])


def summary(
    window: list[dict[str, Any]], step: int, learning_rate: Callable[[int], Any]
) -> dict[str, Any]:
    """Means over the finite metrics of the steps up to `step`, fetched from the devices at once.

    Args:
      window: metrics of consecutive steps, arrays.
      step: steps taken when the last of them was made.
      learning_rate: of the number of steps taken before.

    Returns:
      The mean of each metric, and that of the loss by log-SNR with its counts; how many steps were
      `skipped`, if any; and the `learning_rate` of the last step.
    """
    rows = _numbers(window)
    sound = [row for row in rows if not _not_finite(row)]
    totals = {name: np.sum([row[name] for row in sound], axis=0) for name in rows[0] if sound}
    binned = {}
    if "by_log_snr" in totals:
        sums, counts = totals.pop("by_log_snr").tolist()
        means = [total / n if n else None for total, n in zip(sums, counts, strict=True)]
        binned = {"loss_by_log_snr": means, "count_by_log_snr": [int(n) for n in counts]}
    means = {name: float(total / len(sound)) for name, total in totals.items()}
    skipped = {"skipped": len(rows) - len(sound)} if len(sound) < len(rows) else {}
    return means | skipped | {"learning_rate": float(learning_rate(step - 1))} | binned


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What of a row is one number: all but the loss by log-SNR."""
    return {name: value for name, value in row.items() if not isinstance(value, list)}


def read(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, oldest first, without lines that a kill or a disk has spoilt."""
    path = workdir / ROWS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def kept(workdir: Path, step: int) -> list[dict[str, Any]]:
    """What was kept when the run was stopped at `step`, so that it logs as if it had not been."""
    try:
        found = json.loads((workdir / WINDOW).read_text())
        return found["window"] if found["step"] == step else []
    except (OSError, ValueError, TypeError, KeyError):
        return []  # there is none, or its writing was cut off


def _fetched(window):
    """A row for each step, from the devices or as they were kept; a call may have taken several."""
    rows = []
    for call in jax.device_get(window):
        if np.ndim(call["loss"]) == 0:
            rows.append(call)
        else:
            rows += [{name: x[i] for name, x in call.items()} for i in range(len(call["loss"]))]
    return rows


def _numbers(window):
    """As Python has them and JSON too."""
    rows = _fetched(window)
    return [{name: np.asarray(value).tolist() for name, value in row.items()} for row in rows]


def _not_finite(row):
    return [name for name, value in row.items() if np.ndim(value) == 0 and not np.isfinite(value)]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
