"""Write a trained network as one file, which `checkpoint.load` reads like a run.

    python -m diffjax.export runs/digits digits.safetensors
    python -m diffjax.export 64x64_diffusion.pt adm.safetensors

The second command converts a network that others published; `diffjax.published` lists the formats.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from .. import published
from ..experiment.command_line import error_exit, read_flags
from ..experiment.dataset import located
from ..experiment.run_directory import CHECKPOINTS
from ..training.store import as_path
from . import weights
from .pretrained import PRETRAINED
from .trained import load


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to export, and to which file."""

    source: tyro.conf.Positional[Path]
    """A run's directory, an exported file, the name of a network that comes with diffjax, or the
    folder or file of a network that others published."""
    file: tyro.conf.Positional[Path]
    """The file to write."""
    data_path: Path | None = None
    """Where a run's data is, if it is of version 0.1, which did not record the shape of it."""


def export(source: Path, file: Path, data_path: Path | None = None) -> str:
    """Write the file, and return a line that describes it."""
    source, file = as_path(source), as_path(file)
    named = not source.exists() and str(source) in PRETRAINED
    ours = named or (source / CHECKPOINTS).exists() or source.suffix == ".safetensors"
    params, config = load(source)[1:] if ours else published.load(source)
    weights.save(file, params, located(config, data_path))
    count = sum(x.size for x in jax.tree.leaves(params))
    size = file.stat().st_size
    return (
        f"{file}: {config.data.name}, target {config.target}, {count:,} parameters, {size:,} bytes"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = read_flags(Arguments, sys.argv[1:] if argv is None else argv, __doc__)
    with error_exit():
        print(export(args.source, args.file, args.data_path))
