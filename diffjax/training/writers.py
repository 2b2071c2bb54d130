"""Writers of metrics and pictures beside the run's own files: TensorBoard and Weights & Biases.

Each is a function (the run's directory, the step at which it starts) -> a `Writer`, and needs an
extra of its own. A writer may raise any exception: `recorder.Recorder` then drops it.
"""

import importlib
import importlib.util
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..extras import install
from ..losses import LOG_SNR_EDGES
from . import metrics

EDGES = np.array(LOG_SNR_EDGES, float)


class Writer(NamedTuple):
    """Three functions.

    Attributes:
      row: writes a row of metrics: numbers, and the lists by log-SNR as histograms over
        `losses.LOG_SNR_EDGES`.
      picture: writes (step, name, picture).
      close: called when the run has ended.
    """

    row: Callable[[metrics.Row], Any]
    picture: Callable[[int, str, Image.Image], Any]
    close: Callable[[], Any]


def tensorboard(workdir: Path, step: int) -> Writer:
    """Event files in WORKDIR/tensorboard, which make TensorBoard discard steps after `step`."""
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

    (workdir / "tensorboard").mkdir(exist_ok=True)
    # SummaryWriter writes in a thread, which dies on a full disk, and the run would wait for it.
    file = EventsWriter(str(workdir / "tensorboard" / "events"), f".{step}")

    def write(step, **what):
        file.write_event(Event(step=step, wall_time=time.time(), **what))
        file.flush()

    def picture(step, name, image):
        pixels = np.asarray(image.convert("RGB"))
        write(step, summary=summary.image(name, pixels, dataformats="HWC"))

    def row(row):
        whole = summary.Summary()
        for name, value in metrics.numbers(row).items():
            whole.MergeFrom(summary.scalar(name, value))
        for name, heights in metrics.by_log_snr(row).items():
            middles = (EDGES[:-1] + EDGES[1:]) / 2
            total, first, second = (float(heights @ middles**k) for k in (0, 1, 2))
            low, high = EDGES[0], EDGES[-1]
            whole.MergeFrom(
                summary.histogram_raw(name, low, high, total, first, second, EDGES[1:], heights)
            )
        write(row["step"], summary=whole)

    write(step + 1, session_log=SessionLog(status=SessionLog.START))
    return Writer(row, picture, file.close)


def wandb(workdir: Path, step: int) -> Writer:
    """A run of project diffjax; its id, in WORKDIR/wandb.id, stays the same when the run resumes.

    `step` is an ordinary metric and the axis of every chart: W&B's own step may only increase, and
    would refuse the rows that a resumed run writes again.
    """
    wandb = importlib.import_module("wandb")  # not installed where types are checked
    path = workdir / "wandb.id"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    run = wandb.init(
        project="diffjax",
        name=workdir.name,
        id=path.read_text(),
        resume="allow",
        dir=workdir,
        config=json.loads((workdir / "config.json").read_text()),
        settings=wandb.Settings(console="off"),
    )
    run.define_metric("*", step_metric="step")

    def picture(step, name, image):
        run.log({"step": step, name: wandb.Image(image)})

    def row(row):
        histograms = {
            name: wandb.Histogram(np_histogram=(heights, EDGES))
            for name, heights in metrics.by_log_snr(row).items()
        }
        run.log(metrics.numbers(row) | histograms)

    return Writer(row, picture, run.finish)


class Kind(NamedTuple):
    """A row of `WRITERS`: a writer, and the package that it needs from the extra of this name."""

    open: Callable[[Path, int], Writer]
    package: str
    extra: str


WRITERS: dict[str, Kind] = {
    "tensorboard": Kind(tensorboard, "tensorboardX", "tb"),
    "wandb": Kind(wandb, "wandb", "wandb"),
}


def check(name: str) -> None:
    """Raise a ValueError if there is no such writer, or its package is not installed."""
    if name not in WRITERS:
        raise ValueError(f"unknown writer {name!r}: one of {', '.join(WRITERS)}")
    _, package, extra = WRITERS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a folder of that name, such as W&B creates
        raise ValueError(f"writer {name} needs {package}: {install(extra)}")
