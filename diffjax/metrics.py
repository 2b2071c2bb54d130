"""What a run says of itself: rows of `metrics.jsonl`, and a line on the terminal."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.live import Live

ROWS = "metrics.jsonl"


class Recorder:
    """Writes rows of metrics, and shows the newest: a live line on a terminal, else plain lines.

    Use as a context manager; rows are on disk as soon as they are written.

    Args:
      workdir: the run's directory.
      step: where the run starts; rows of later steps, of a run that was cut off, are dropped.
      steps: where it ends, for the time it still takes.
      title: what stands before every line.
    """

    def __init__(self, workdir: Path, step: int, steps: int, title: str = "") -> None:
        self.path, self.steps, self.title = workdir / ROWS, steps, title
        rows = [row for row in read(workdir) if row["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(self.path)
        self.console = Console()
        self.live = Live(console=self.console)
        self.began = self.at = step, time.perf_counter()

    def __enter__(self) -> "Recorder":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def write(self, step: int, batch_size: int, **metrics: float) -> None:
        """Write a row: the metrics given, and the speed since the last one."""
        # A first row right after the start has the run's whole beginning to be measured by.
        last_step, last_time = self.at if step > self.at[0] else self.began
        self.at = step, now = step, time.perf_counter()
        speed = (step - last_step) / (now - last_time)
        row = {"step": step, **metrics, "img_per_s": speed * batch_size}
        left = f"  {_clock((self.steps - step) / speed)} left"
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
        line = f"{self.title}step {step}/{self.steps}  {numbers}{left}"
        if self.live.is_started:
            self.live.update(line)
        else:
            self.say(line)

    def start(self, step: int) -> None:
        """Measure the speed of the next row from here, so as to leave out what was before."""
        self.at = step, time.perf_counter()


def summary(
    window: list[dict[str, Any]], step: int, learning_rate: Callable[[int], Any]
) -> dict[str, float]:
    """Means over the metrics of the steps up to `step`, fetched from the devices at once.

    Args:
      window: metrics of consecutive steps, arrays on the devices.
      step: steps taken when the last of them was made.
      learning_rate: of the number of steps taken before.

    Returns:
      The mean of each metric, and the `learning_rate` of the last step.

    Raises:
      FloatingPointError: if a metric is not finite; names the step and its learning rate.
    """
    rows = jax.device_get(window)
    for i, row in enumerate(rows):
        for name, value in row.items():
            if not np.isfinite(value):
                at = step - len(rows) + i
                rate = float(learning_rate(at))
                raise FloatingPointError(
                    f"{name} is {value} at step {at + 1}, learning rate {rate:.3g}"
                )
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return means | {"learning_rate": float(learning_rate(step - 1))}


def read(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, oldest first; a last line cut short by a kill is left out."""
    path = workdir / ROWS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
