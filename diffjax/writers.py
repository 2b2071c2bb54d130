"""Who else gets a run's metrics and pictures: TensorBoard and Weights & Biases, an extra each.

Each is a function (the run's directory, the step it starts at) -> a `Writer`. A writer may raise
what it likes: `metrics.Recorder` then does without it.
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


class Writer(NamedTuple):
    """Where metrics go.

    Attributes:
      row: the numbers of a row of metrics.
      picture: (step, name, picture).
      close: the run has ended.
    """

    row: Callable[[dict[str, float]], Any]
    picture: Callable[[int, str, Image.Image], Any]
    close: Callable[[], Any]


def tensorboard(workdir: Path, step: int) -> Writer:
    """Event files in WORKDIR/tensorboard; TensorBoard forgets what it has of steps after `step`."""
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

    (workdir / "tensorboard").mkdir(exist_ok=True)
    # SummaryWriter would write in a thread, which a full disk kills: the run would wait for it.
    file = EventsWriter(str(workdir / "tensorboard" / "events"), f".{step}")

    def write(step, **what):
        file.write_event(Event(step=step, wall_time=time.time(), **what))
        file.flush()

    def picture(step, name, image):
        pixels = np.asarray(image.convert("RGB"))
        write(step, summary=summary.image(name, pixels, dataformats="HWC"))

    def row(row):
        whole = summary.Summary()
        for name, value in row.items():
            whole.MergeFrom(summary.scalar(name, value))
        write(row["step"], summary=whole)

    write(step + 1, session_log=SessionLog(status=SessionLog.START))
    return Writer(row, picture, file.close)


def wandb(workdir: Path, step: int) -> Writer:
    """A run of project diffjax, under one id, kept in WORKDIR/wandb.id, however often it resumes.

    `step` is a metric like the others and every chart's axis: W&B's own count only ever rises, and
    would refuse the rows that a run which was cut off writes again, each the same as before.
    """
    wandb = importlib.import_module("wandb")  # heavy: not there where types are checked
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

    return Writer(lambda row: run.log(row), picture, run.finish)


class Kind(NamedTuple):
    """A kind of writer, and the package that it needs from the extra of this name."""

    open: Callable[[Path, int], Writer]
    package: str
    extra: str


WRITERS: dict[str, Kind] = {
    "tensorboard": Kind(tensorboard, "tensorboardX", "tb"),
    "wandb": Kind(wandb, "wandb", "wandb"),
}


def check(name: str) -> None:
    """Refuse a writer that cannot be.

    Raises:
      ValueError: if there is none of this name, or its package is missing.
    """
    if name not in WRITERS:
        raise ValueError(f"unknown writer {name!r}: one of {', '.join(WRITERS)}")
    _, package, extra = WRITERS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a folder of that name, such as wandb leaves behind
        raise ValueError(f"writer {name} needs {package}: pip install 'diffjax[{extra}]'")
