"""The command lines of sample.py and evaluate.py, whose defaults are the run's own settings."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..experiment import Walk
from ..experiment.command_line import read_flags, take, walk_defaults
from ..published.trained import read_config
from ..training.store import as_path

Arguments = TypeVar("Arguments")


def parse_with_run(
    kind: type[Arguments], argv: Sequence[str], description: str | None
) -> Arguments:
    """Read the arguments of a command, in which the flags of a walk default to the run's settings.

    With `--sampler=NAME` they default to the best settings of this sampler (`walk_defaults`).

    Args:
      kind: a frozen dataclass with fields `workdir` and `drawing`, a `Drawing`.
      argv: the arguments.
      description: text for --help.

    Raises:
      SystemExit: after printing the help or an error of a few lines.
    """
    default: Any = kind()
    workdir, _ = take(argv, "--workdir")
    sampler, rest = take(argv, "--sampler")
    walk = walk_defaults(run_walk(workdir or default.workdir), sampler)
    drawing = dataclasses.replace(default.drawing, walk=walk)
    args: Any = read_flags(kind, rest, description, dataclasses.replace(default, drawing=drawing))
    # An option on the command line is added to those of the run.
    options = walk.options | args.drawing.walk.options
    walk = dataclasses.replace(args.drawing.walk, options=options)
    return dataclasses.replace(args, drawing=dataclasses.replace(args.drawing, walk=walk))


def run_walk(source: Path | str) -> Walk:
    """The walk of a run's config, or the default if there is no run, which the command reports."""
    try:
        return read_config(as_path(source)).sampling
    except (ValueError, OSError):
        return Walk()
