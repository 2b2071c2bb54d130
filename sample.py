"""Draw samples from a trained network: a file of all of them, and a picture of the first.

    python sample.py --workdir=runs/digits
    python sample.py --workdir=runs/digits --n=1000 --label=7 --sampler=dpm_solver_pp_2m --steps=20
    python sample.py --workdir=digits --guidance classifier_free:weight=3 within:low=-2,high=4
    python sample.py --workdir=digits --guidance autoguidance:weight=2,weaker=runs/small
    python sample.py --help

Writes OUT.npz, with `x` (uint8 if the data are bytes, else float32 in the data's range; of latents
the images that the autoencoder makes of them, or, without one, the latents in float32), `index`,
`label` if there are classes, and `settings`, JSON of everything that the samples depend on; and
OUT.png. The same command continues one that was stopped. Sample i does not depend on how many are
drawn, on how many at a time, or on how many devices.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from diffjax import checkpoint, data, plots
from diffjax.evaluation import pixels, provenance, sampling
from diffjax.evaluation.command_line import parse_with_run
from diffjax.evaluation.sampling import Drawing
from diffjax.experiment.command_line import error_exit
from diffjax.experiment.dataset import example_dtype, example_shape, located
from diffjax.published import cascades
from diffjax.training import parsing, runners, store
from diffjax.training.distributed import Distributed, failing_fast, setup
from diffjax.training.files import digest, flatten, replacing, unequal, write_text


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to draw, and where it goes."""

    workdir: Path = Path("runs/digits")
    """A run's directory, an exported file, or the name of a network that comes with diffjax."""
    drawing: tyro.conf.OmitArgPrefixes[Drawing] = Drawing()  # noqa: RUF009, it is frozen
    """Which samples, and how they are drawn."""
    shape: tuple[int, ...] | None = None
    """Shape of a sample, or of its latent; None: that of the run's data."""
    data_path: Path | None = None
    """Path of the data of a run of version 0.1, which did not record their shape."""
    autoencoder: Path | None = None
    """The autoencoder that decodes latents; None: that of the run."""
    out: Path | None = None
    """The file of samples, which ends with .npz; None: generated.npz in the run's directory. The
    picture has the same name with .png."""
    picture: int = 100
    """Largest number of samples in the picture."""
    batch_size: int | None = None
    """Samples drawn, and then written, at a time; None: as many as in training."""
    distributed: Distributed = Distributed()  # noqa: RUF009, it is frozen
    """Where this process stands among several."""


def sample(args: Arguments) -> None:
    """Draw what is not there yet, in each process of a pod alike."""
    with error_exit():
        # Everything that is wrong with the input is reported before anything is loaded or compiled.
        out = args.out or checkpoint.home(args.workdir) / "generated.npz"
        check_out(out)
        e = sampling.drawn_by(checkpoint.read_config(args.workdir), args.drawing)
        size = e.config.batch_size if args.batch_size is None else args.batch_size
        if args.picture < 1 or size < 1:
            raise ValueError(f"picture={args.picture}, batch_size={size}: must be at least 1")
        # What is drawn is on the disk, so SIGTERM may end the process at once.
        jax.config.update("jax_enable_preemption_service", False)
        setup(args.distributed, size)
        config = located(e.config, args.data_path, args.autoencoder)
        shape = args.shape or example_shape(config)
        _, params, _ = checkpoint.load(args.workdir, args.drawing.average)
        sampling.check_shape(e, params, shape)
        sampling.check_parameters(params, args.workdir)
        others = sampling.load_others(e, shape)
        generate = sampling.make_generate(e, shape, others)
        runner = runners.choose(e.config.parallel)
        form = pixels.form(config, runner, shape, example_dtype(config))

        settings = sampling.settings(e, args.drawing, params) | form.about | others.settings
        settings |= {"shape": list(form.shape), "dtype": form.dtype.__name__}
        parts = out.with_suffix(".parts")
        done = open_parts(parts, out, settings)

    n, label = args.drawing.n, sampling.labels(e.config, args.drawing)
    first = jax.process_index() == 0
    with error_exit(OSError, FloatingPointError):
        drawn = sampling.draw(
            runner, generate, others.join(params), label, range(done, n), size, form.store
        )
        for x in sampling.with_progress(drawn, "samples", n, done):
            if first:
                sampling.save_part(parts, done, x)
            done += len(x)
    if not first:
        return

    with error_exit(OSError):
        if parts.exists():
            join(parts, out, label, settings)
        classes = cascades.classes(e.config) if args.drawing.label is None else 0
        picture = save_picture(out, args.picture, classes)
    print(f"{out} and {picture}: {n:,} samples")


def check_out(out: Path) -> None:
    """Raise a ValueError unless samples and their picture can be written under these names."""
    if out.suffix != ".npz":
        raise ValueError(f"out={out}: must end with .npz, as {out}.npz; the picture is beside it")
    for file in (out, out.with_suffix(".png")):
        if file.is_dir():
            raise ValueError(f"out={out}: {file} is a directory")


def open_parts(parts: Path, out: Path, settings: dict[str, Any]) -> int:
    """The number of samples that are already in `out`, or in a directory of parts of it.

    Raises:
      ValueError: if those have other settings, and names what differs; or if `out` is damaged.
    """
    known = parts / "settings.json"
    if out.exists():
        found, done = sampling.read(out)[1], settings["n"]
    elif known.exists():
        found = sampling.upgraded(parsing.read(known))
        done = sampling.count_parts(parts)
        written = sampling.count_written(parts)
        if done < written and jax.process_index() == 0:
            print(f"{parts}: samples {done} to {written - 1} are damaged, and are drawn again")
    else:
        found, done = settings, 0
        if jax.process_index() == 0:
            parts.mkdir(parents=True, exist_ok=True)
            write_text(known, json.dumps(settings))
    asked = {name: found[name] for name in found if name not in ("program", "sha256")}
    lines = unequal(flatten(asked), flatten(settings), "it has {!r}, asked for {!r}")
    if lines:
        raise ValueError(
            f"{out} holds samples of other settings; choose another --out, or undo:\n  "
            + "\n  ".join(lines.values())
        )
    return done


def join(parts: Path, out: Path, label: np.ndarray | None, settings: dict[str, Any]) -> None:
    """Join the parts to one file, and delete them."""
    x = np.concatenate(list(sampling.read_parts(parts)))
    if len(x) != settings["n"]:
        raise OSError(f"{parts} holds {len(x)} samples, not {settings['n']}")
    text = json.dumps(settings | {"program": provenance.program(), "sha256": digest(x)})
    arrays: dict[str, Any] = {"x": x, "index": np.arange(len(x)), "settings": text}
    arrays |= {} if label is None else {"label": label}
    with replacing(out) as new, new.open("wb") as file:
        np.savez(file, **arrays)
    store.remove(parts)


def save_picture(out: Path, most: int, classes: int) -> str:
    """Draw the first samples of a file, with a row for each class if there are several.

    Returns:
      The name of the picture, or why there is none.
    """
    examples, _ = sampling.read(out)
    n = min(most, len(examples.x))
    if classes > n:
        classes = 0
    n -= n % (classes or 1)
    x = data.take(examples, np.arange(n))["x"]
    try:
        picture = plots.samples(x, classes)
    except ValueError as error:
        return f"no picture ({error})"
    with replacing(out.with_suffix(".png")) as new:
        picture.save(new, format="PNG")
    return out.with_suffix(".png").name


def main(argv: Sequence[str]) -> None:
    """The command."""
    sample(parse_with_run(Arguments, argv, __doc__))


if __name__ == "__main__":
    with failing_fast():
        main(sys.argv[1:])
