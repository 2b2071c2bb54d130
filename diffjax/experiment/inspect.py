"""Print what a run's directory holds: config, checkpoints and whether they are sound, metrics.

    python -m diffjax.inspect runs/digits

It only reads, so the run may be in progress; it verifies every checkpoint against its seal.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from ..densities import fit_normal
from ..losses import LOG_SNR_EDGES
from ..training import metrics, parsing, store
from ..training.checkpoints import ARRAYS, damage_of
from . import run_directory
from .command_line import error_exit, read_flags
from .config import Config, fields
from .functions import resolve


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The run to print."""

    workdir: tyro.conf.Positional[Path]
    """A run's directory."""
    deep: bool = False
    """Download and hash every file of a run in a bucket, whose own hashes are trusted otherwise."""


def report(workdir: Path, console: Console, deep: bool = False) -> int:
    """Print the report; returns how many checkpoints are damaged.

    Raises:
      FileNotFoundError: if the directory is not that of a run.
      ValueError: if its config is damaged.
    """
    config = run_directory.read_config(workdir)
    console.print(f"{workdir}: {config.data.name}, target {config.target}, {config.steps} steps")
    default = fields(Config())
    changed = [f"{k}={v}" for k, v in fields(config).items() if v != default.get(k)]
    console.print("config, where it differs from the default:", *changed or ["nowhere"], sep="\n  ")

    damaged = 0
    table = Table("step", "bytes", "files", "arrays", "eval_loss", "state")
    rows = metrics.read(workdir)
    losses = {row["step"]: f"{row['eval_loss']:.4g}" for row in rows if "eval_loss" in row}
    for path in run_directory.list_checkpoints(workdir):
        with contextlib.suppress(FileNotFoundError):  # the run may delete it meanwhile
            damage = damage_of(path, deep)
            sizes = [entry.size for entry in store.listing(path).values()]
            count = len(parsing.read(path / ARRAYS)) if damage is None else "?"
            path.stat()
            loss = losses.get(int(path.name), "")
            row = path.name, f"{sum(sizes):,}", len(sizes), count, loss, damage or "sound"
            table.add_row(*map(str, row))
            damaged += damage is not None
    console.print(table)
    for path in sorted((workdir / run_directory.CHECKPOINTS).glob("damaged-*")):
        console.print(f"renamed: {path.name}")
    if config.learns_schedule and len(table.rows) > damaged:
        own = run_directory.read_params(workdir)["schedule"]
        ends = own["log_snr_max"], own["log_snr_min"]
        console.print("learned schedule: log-SNR from {:.4g} to {:.4g}".format(*map(float, ends)))
    if rows:
        last = metrics.numbers(rows[-1])
        console.print("last metrics: " + "  ".join(f"{k} {v:.4g}" for k, v in last.items()))
    by_log_snr = [metrics.by_log_snr(row) for row in rows if "loss_by_log_snr" in row]
    for binned in by_log_snr[-1:]:
        console.print(*advice(config, binned["loss_by_log_snr"]))
    return damaged


def advice(config: Config, losses: np.ndarray) -> list[str]:
    """A line with the density of noise levels that losses by log-SNR ask for; none if none does."""
    if config.loss_aware_times or config.learned_uncertainty or not config.density_weights:
        return []
    with contextlib.suppress(ValueError, OverflowError):  # of a damaged line of metrics
        losses = losses.astype(np.float32)
        found = fit_normal(resolve(config).schedule, LOG_SNR_EDGES, losses)
        mean, std = (f"{float(x):.1f}" for x in found)
        words = f"--config.density=normal --config.density_options mean={mean} std={std}"
        return [f"its losses would vary least with {words}"]
    return []


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exits with 1 if a checkpoint is damaged."""
    args = read_flags(Arguments, sys.argv[1:] if argv is None else argv, __doc__)
    with error_exit():
        sys.exit(int(report(args.workdir, Console(highlight=False), args.deep) > 0))
