"""Draw samples from a trained run: a file of all of them, and a picture of the first.

    python sample.py --workdir=runs/digits
    python sample.py --workdir=runs/digits --n=1000 --label=7 --sampler=dpm_solver_pp_2m --steps=20
    python sample.py --help

Writes OUT.npz, with `x` (images as uint8, vectors as float32), `index`, `label` if there are
classes, and `settings`, JSON of all that the samples depend on; and OUT.png. The same command goes
on where one was stopped. Sample i does not depend on how many are drawn, on how many at a time, nor
on how many devices.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from diffjax import checkpoint, data, drawing, experiment, parallel, plots, provenance
from diffjax.config import flatten, plainly, unlike
from diffjax.drawing import Drawing
from diffjax.files import replacing, write_text


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to draw, and where it goes."""

    workdir: Path = Path("runs/digits")
    """A run's directory."""
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = Drawing()  # noqa: RUF009, it is frozen
    """Which samples, by which walk."""
    shape: tuple[int, ...] | None = None
    """Of a sample; None: that of the run's data, which then must be there."""
    out: Path | None = None
    """The file of samples; None: generated.npz in the run's directory."""
    picture: int = 100
    """Samples in the picture, at most."""
    batch_size: int | None = None
    """Samples drawn, and then written, at a time; None: as many as in training."""
    distributed: parallel.Distributed = parallel.Distributed()  # noqa: RUF009, it is frozen
    """Which of how many processes this is."""


def sample(args: Arguments) -> None:
    """Draw what is not there yet, in each process of a pod alike."""
    with plainly():
        # Whatever is wrong with the input is said now, before anything is loaded or compiled.
        config = drawing.configured(checkpoint.read_config(args.workdir), args.drawing)
        size = config.batch_size if args.batch_size is None else args.batch_size
        if args.picture < 1 or size < 1:
            raise ValueError(f"picture={args.picture}, batch_size={size}: must be at least 1")
        # What is drawn is on disk: a signal shall end it, not wait for a step to ask.
        jax.config.update("jax_enable_preemption_service", False)
        parallel.setup(args.distributed, size)
        shape = args.shape or experiment.example_shape(config)
        network, params, _ = checkpoint.load(args.workdir)
        generate = experiment.make_generate(config, network, shape)
        drawing.check_shape(config, params, shape)

        home = args.workdir if args.workdir.is_dir() else args.workdir.parent
        out = args.out or home / "generated.npz"
        settings = drawing.settings(config, args.drawing, params) | {"shape": list(shape)}
        parts = out.with_suffix(".parts")
        done = open_parts(parts, out, settings)

    n, label = args.drawing.n, drawing.labels(config, args.drawing)
    first = jax.process_index() == 0
    with plainly(OSError):
        drawn = drawing.draw(generate, params, label, range(done, n), size)
        for x in drawing.watched(drawn, f"{n:,} samples", n, done):
            done += len(x)
            if first:
                with replacing(parts / f"{done:09}.npy") as new, new.open("wb") as file:
                    np.save(file, x)
    if not first:
        return

    with plainly(OSError):
        if parts.exists():
            join(parts, out, label, settings)
        save_picture(out, args.picture, config.model.labels if args.drawing.label is None else 0)
    print(f"{out} and {out.with_suffix('.png').name}: {n:,} samples")


def open_parts(parts: Path, out: Path, settings: dict[str, Any]) -> int:
    """How many samples are there already, in `out` or in a directory of parts of it.

    Raises:
      ValueError: if they are of other settings, and names what differs.
    """
    known = parts / "settings.json"
    if out.exists():
        found, done = drawing.read(out)[1], settings["n"]
    elif known.exists():
        found = json.loads(known.read_text())
        # Written one after the other, each whole, and named by how many there are with it.
        done = max((int(path.stem) for path in parts.glob("*.npy")), default=0)
    else:
        found, done = settings, 0
        if jax.process_index() == 0:
            parts.mkdir(parents=True, exist_ok=True)
            write_text(known, json.dumps(settings))
    found.pop("program", None)
    lines = unlike(flatten(found), flatten(settings), "it has {!r}, asked for {!r}")
    if lines:
        raise ValueError(
            f"{out} is of other samples; choose another --out, or undo:\n  "
            + "\n  ".join(lines.values())
        )
    return done


def join(parts: Path, out: Path, label: np.ndarray | None, settings: dict[str, Any]) -> None:
    """Make one file of the parts, which then go."""
    x = np.concatenate([np.load(path) for path in sorted(parts.glob("*.npy"))])
    text = json.dumps(settings | {"program": provenance.program()})
    arrays: dict[str, Any] = {"x": x, "index": np.arange(len(x)), "settings": text}
    arrays |= {} if label is None else {"label": label}
    with replacing(out) as new, new.open("wb") as file:
        np.savez(file, **arrays)
    shutil.rmtree(parts)


def save_picture(out: Path, most: int, classes: int) -> None:
    """The first samples of a file; with a row for each class, if there are several."""
    examples, _ = drawing.read(out)
    n = min(most, len(examples.x))
    if classes > n:
        classes = 0
    n -= n % (classes or 1)
    x = data.take(examples, np.arange(n))["x"]
    plots.samples(x, classes).save(out.with_suffix(".png"))


if __name__ == "__main__":
    with parallel.failing_fast():
        sample(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagConversionOff,)))
