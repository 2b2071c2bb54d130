"""Metrics of steps: their mean between log points, and the rows of `metrics.jsonl`.

A row has numbers, and, for each bin of log-SNR (`losses.LOG_SNR_EDGES`), the mean loss of the
examples in it, `loss_by_log_snr` (None for an empty bin), and their number, `count_by_log_snr`. All
of them cover the steps since the row before.

A *window* is the metrics of consecutive steps, arrays that may still be on the devices.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from . import parsing
from .files import write_text

ROWS = "metrics.jsonl"
WINDOW = "window.json"

Window = list[dict[str, Any]]
Row = dict[str, Any]


def summary(window: Window, step: int, learning_rate: Callable[[int], Any]) -> Row:
    """Means over the finite metrics of a window, fetched from the devices at once.

    Args:
      window: metrics of consecutive steps.
      step: steps taken when the last of them was made.
      learning_rate: a function of the number of steps taken before.

    Returns:
      The mean of each metric, and the loss by log-SNR with its counts; the number of steps that
      were `skipped`, if any; and the `learning_rate` of the last step.
    """
    rows = _as_python(window)
    finite = [row for row in rows if not _not_finite(row)]
    totals = {name: np.sum([row[name] for row in finite], axis=0) for name in rows[0] if finite}
    binned = {}
    if "by_log_snr" in totals:
        sums, counts = totals.pop("by_log_snr").tolist()
        means = [total / n if n else None for total, n in zip(sums, counts, strict=True)]
        binned = {"loss_by_log_snr": means, "count_by_log_snr": [int(n) for n in counts]}
    means = {name: float(total / len(finite)) for name, total in totals.items()}
    skipped = {"skipped": len(rows) - len(finite)} if len(finite) < len(rows) else {}
    return means | skipped | {"learning_rate": float(learning_rate(step - 1))} | binned


class NonFinite(NamedTuple):
    """A step whose metrics are not all finite: how many steps came before it, and what is wrong."""

    taken: int
    why: str


def find_nonfinite(window: Window, step: int) -> list[NonFinite]:
    """The steps of a window with an infinite or undefined metric.

    Args:
      window: metrics of consecutive steps.
      step: steps taken when the last of them was made.

    >>> find_nonfinite([{"loss": np.float32(1)}, {"loss": np.float32("nan")}], step=10)
    [NonFinite(taken=9, why='loss is nan')]
    """
    rows = _fetched(window)
    return [
        NonFinite(taken, ", ".join(f"{name} is {row[name]}" for name in _not_finite(row)))
        for taken, row in enumerate(rows, step - len(rows))
        if _not_finite(row)
    ]


def numbers(row: Row) -> dict[str, float]:
    """The entries of a row that are single numbers: all but the loss by log-SNR."""
    return {name: value for name, value in row.items() if not isinstance(value, list)}


def by_log_snr(row: Row) -> dict[str, np.ndarray]:
    """The entries of a row that are lists over the bins of log-SNR; 0 where a bin is empty."""
    filled = lambda parts: np.array([0.0 if part is None else part for part in parts])
    return {name: filled(value) for name, value in row.items() if isinstance(value, list)}


def read(workdir: Path) -> list[Row]:
    """The rows of a run's metrics, oldest first, without lines that were cut off or damaged."""
    path = workdir / ROWS
    if not path.is_file():
        return []
    rows = []
    with path.open(errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                rows.append(_checked(parsing.parse(line)))
    return rows


def _checked(row):
    """A row, if its entries are of the types that rows have; else a ValueError."""
    parsing.field(row, "step", int)
    for name, value in row.items():
        by_log_snr = name.endswith("_by_log_snr")
        if isinstance(value, list) != by_log_snr:
            raise parsing.mismatch(name, value, "a list" if by_log_snr else "a number")
        parts = [x for x in value if x is not None] if by_log_snr else [value]
        if not all(parsing.is_of(part, int, float) for part in parts):
            raise parsing.mismatch(name, value, "made of numbers")
    return row


def save_window(workdir: Path, step: int, window: Window) -> None:
    """Save the window of a run that stops at `step`, between two log points."""
    text = json.dumps({"step": step, "window": _as_python(window)})
    write_text(workdir / WINDOW, text + "\n")


def load_window(workdir: Path, step: int) -> Window:
    """The window that was saved when the run stopped at `step`, else an empty one.

    With it, a run that was stopped logs the same rows as one that was not.
    """
    if not (workdir / WINDOW).is_file():
        return []
    try:
        saved = parsing.read(workdir / WINDOW)
        rows = parsing.field(saved, "window", list)
        whole = all(isinstance(row, dict) and "loss" in row for row in rows)
        return rows if whole and saved["step"] == step else []
    except (OSError, ValueError, KeyError):
        return []  # it was cut off


def _fetched(window):
    """A row for each step, on the host; one entry of a window may cover several steps."""
    rows = []
    for call in jax.device_get(window):
        if np.ndim(call["loss"]) == 0:
            rows.append(call)
        else:
            rows += [{name: x[i] for name, x in call.items()} for i in range(len(call["loss"]))]
    return rows


def _as_python(window):
    """The rows of a window as Python numbers and lists, which JSON can store."""
    rows = _fetched(window)
    return [{name: np.asarray(value).tolist() for name, value in row.items()} for row in rows]


def _not_finite(row):
    return [name for name, value in row.items() if np.ndim(value) == 0 and not np.isfinite(value)]
