"""From words on the command line to a config, and errors as one line.

A choice on which other defaults depend is read first: `--config=FILE` for every field, the name of
a network, schedule, weighting or sampler for its options. Options of the config that the new choice
does not have are dropped. The rest of the words override fields of the result.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tyro

from ..data.transient import is_transient
from ..densities import DENSITIES
from ..models import MODELS, name_of, switched
from ..schedules import SCHEDULES
from ..training.distributed import CRASHED, Distributed
from ..weightings import WEIGHTINGS
from .config import Config, Walk

AnyWalk = TypeVar("AnyWalk", bound=Walk)

SETTINGS = (tyro.conf.FlagConversionOff,)
"""How every command reads its flags: --flag=True, never --flag --no-flag."""


class Command(NamedTuple):
    """What the command line of train.py asks for.

    Attributes:
      config: the experiment, not yet checked.
      workdir: the run's directory.
      distributed: where this process stands among several.
      profile: number of steps to trace.
    """

    config: Config
    workdir: Path
    distributed: Distributed
    profile: int


def parse(argv: Sequence[str], default: str = "configs/digits.py") -> Command:
    """Read `[--config=FILE[:variant]] [--config.model=NAME] [--workdir=DIR] [--config.FIELD=...]`.

    Raises:
      SystemExit: after printing the help, or what is wrong in a few lines.
    """
    file, rest = take(argv, "--config")
    model, rest = take(rest, "--config.model")
    sampler, rest = take(rest, "--config.sampling.sampler")
    file = file or default
    with error_exit():
        base = from_file(file)
        if model is not None:
            base = dataclasses.replace(base, model=switched(base.model, model))
    for field, table in (
        ("schedule", SCHEDULES),
        ("weighting", WEIGHTINGS),
        ("density", DENSITIES),
    ):
        name, rest = take(rest, f"--config.{field}")
        if name is not None:
            options = accepted(table, name, getattr(base, f"{field}_options"))
            base = dataclasses.replace(base, **{field: name, f"{field}_options": options})
    if sampler not in (None, base.sampling.sampler):
        base = dataclasses.replace(base, sampling=with_sampler(base.sampling, sampler))
    name = Path(file.partition(":")[0]).stem

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        config: tyro.conf.AvoidSubcommands[Config] = base
        workdir: Path = Path("runs") / name
        """Directory of checkpoints, metrics and pictures; a run that is in it is resumed."""
        distributed: Distributed = Distributed()  # noqa: RUF009, it is frozen
        profile: int = 0
        """Number of steps, from the tenth on, to trace into WORKDIR/profile."""

    args = tyro.cli(
        Arguments,
        args=rest,
        description=f"--config=FILE[:variant] chooses the experiment; this is {file}. "
        f"--config.model=NAME chooses the network, one of {{{','.join(MODELS)}}}; this is "
        f"{name_of(base.model)}. Every field can be changed:",
        config=SETTINGS,
        use_underscores=True,
    )
    if args.profile < 0:
        sys.exit(f"error: profile={args.profile}: must be at least 0, the number of steps to trace")
    return Command(args.config, args.workdir, args.distributed, args.profile)


def accepted(table: Mapping[str, Callable], name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the function of this name has too.

    >>> accepted(SCHEDULES, "linear", {"log_snr_min": -8.0, "log_snr_max": 7.0})
    {'log_snr_max': 7.0}
    """
    if name not in table:
        return {}  # the name is refused later
    parameters = inspect.signature(table[name]).parameters
    return {option: value for option, value in options.items() if option in parameters}


def walk_defaults(walk: Walk, sampler: str | None) -> Walk:
    """The walk of a run, or, for another sampler, that with this sampler's own options and grid.

    >>> walk_defaults(Walk(times="uniform", options={"eta": 1.0}), "edm").grid
    'karras'
    """
    walk = Walk(**{f.name: getattr(walk, f.name) for f in dataclasses.fields(Walk)})
    return walk if sampler is None else with_sampler(walk, sampler)


def with_sampler(walk: AnyWalk, sampler: str) -> AnyWalk:
    """The same walk by another sampler, with its default options and on the grid that suits it."""
    return dataclasses.replace(walk, sampler=sampler, options={}, times=None)


@contextlib.contextmanager
def error_exit(*errors: type[Exception]) -> Iterator[None]:
    """End the program with one line, "error: ...", at an error of these kinds.

    By default, at those that the input may cause: ValueError and OSError. The exit status is 1,
    which says that the input is refused, or `CRASHED` if the system failed: the launcher then
    starts the program again.
    """
    kinds = errors or (ValueError, OSError)
    try:
        yield
    except kinds as error:
        if is_transient(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(CRASHED)
        sys.exit(f"error: {error}")


def from_file(spec: str) -> Config:
    """The config of `FILE.py` or `FILE.py:variant`.

    The file is Python, and is executed: use only files that you trust.

    Raises:
      FileNotFoundError: if there is no such file; names those beside it.
      ValueError: if it has no such variant.
    """
    name, _, variant = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.py"))
        raise FileNotFoundError(f"no config {name}; there are: {', '.join(beside) or 'none'}")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise FileNotFoundError(f"{name} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config(variant)


def take(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Take `name=VALUE` or `name VALUE` out of the words; return VALUE, or None, and the rest.

    >>> take(["--n=3", "--config", "a.py"], "--config")
    ('a.py', ['--n=3'])
    """
    rest, value = [], None
    words = iter(argv)
    for word in words:
        if word == name:
            value = next(words, None)
        elif word.startswith(name + "="):
            value = word.removeprefix(name + "=")
        else:
            rest.append(word)
    return value, rest
