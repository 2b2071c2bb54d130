"""From words on the command line to a config, and errors as one line.

A choice on which other defaults depend is read first: `--config=NAME` for every field, the name of
a network, schedule, weighting or sampler for its options. Options of the config that the new choice
does not have are dropped. The rest of the words override fields of the result.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tyro

from ..couplings import COUPLINGS
from ..data.transient import is_transient
from ..densities import DENSITIES
from ..models import MODELS, name_of, switched
from ..schedules import SCHEDULES
from ..training.distributed import CRASHED, Distributed
from ..training.store import as_path
from ..weightings import WEIGHTINGS
from .config import Config, Walk

AnyWalk = TypeVar("AnyWalk", bound=Walk)
Arguments = TypeVar("Arguments")


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


def parse(argv: Sequence[str], configs: Path = Path("configs")) -> Command:
    """Read `[--config=NAME[:variant]] [--config.model=NAME] [--workdir=DIR] [--config.FIELD=...]`.

    Args:
      argv: the arguments.
      configs: the folder of configs that are chosen by name.

    Raises:
      SystemExit: after printing the help, or what is wrong in a few lines.
    """
    file, rest = take(argv, "--config")
    model, rest = take(rest, "--config.model")
    sampler, rest = take(rest, "--config.sampling.sampler")
    file = file or "digits"
    with error_exit():
        base = from_file(file, configs)
        if model is not None:
            base = dataclasses.replace(base, model=switched(base.model, model))
    for field, table in (
        ("schedule", SCHEDULES),
        ("weighting", WEIGHTINGS),
        ("density", DENSITIES),
        ("coupling", COUPLINGS),
    ):
        name, rest = take(rest, f"--config.{field}")
        if name is not None:
            options = accepted(table, name, getattr(base, f"{field}_options"))
            base = dataclasses.replace(base, **{field: name, f"{field}_options": options})
    if sampler not in (None, base.sampling.sampler):
        base = dataclasses.replace(base, sampling=with_sampler(base.sampling, sampler))
    name = Path(file.partition(":")[0]).stem

    @dataclasses.dataclass(frozen=True)
    class Flags:
        config: tyro.conf.AvoidSubcommands[Config] = base
        workdir: Path = Path("runs") / name
        """Directory of checkpoints, metrics and pictures; a run that is in it is resumed."""
        distributed: Distributed = Distributed()  # noqa: RUF009, it is frozen
        """Where this process stands among several."""
        profile: int = 0
        """Number of steps, from the tenth on, to trace into WORKDIR/profile."""

    args = read_flags(
        Flags,
        rest,
        "Train a diffusion model, or go on with the run in --workdir.\n\n"
        f"--config=NAME, NAME:VARIANT or a file chooses the experiment; this is {file}. The names "
        f"are {', '.join(names(configs))}; every one has the variant smoke, a run of seconds. "
        f"--config.model=NAME chooses the network, one of {{{','.join(MODELS)}}}; this is "
        f"{name_of(base.model)}. Every field can be changed:",
    )
    if args.profile < 0:
        sys.exit(f"error: profile={args.profile}: must be at least 0, the number of steps to trace")
    return Command(args.config, args.workdir, args.distributed, args.profile)


def read_flags(
    kind: type[Arguments],
    argv: Sequence[str],
    description: str | None,
    default: Arguments | None = None,
) -> Arguments:
    """Read the flags of any command: --flag_name=True, never --flag-name --no-flag-name.

    Args:
      kind: a dataclass of the flags.
      argv: the arguments.
      description: text for --help.
      default: values of the flags that are not given; None: those of the class.

    Returns:
      The flags, in which every path is what `store.as_path` makes of it.

    Raises:
      SystemExit: after printing the help, or what is wrong in a few lines.
    """
    args, unknown = tyro.cli(
        kind,
        prog=_program(Path(sys.argv[0])),
        args=argv,
        default=default,
        description=description,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
        return_unknown_args=True,
    )
    with error_exit():
        if unknown:
            word = unknown[0].partition("=")[0]
            meant = _similar(word, _flags(args))
            hint = f"did you mean {meant}? " if meant else ""
            raise ValueError(f"unknown {word}: {hint}--help lists all flags")
        return _with_paths(args)


def _program(script):
    """What was typed to run a script, such as `python -m diffjax.inspect`."""
    package = Path(__file__).parents[1]
    if not script.is_relative_to(package):
        return script.name
    parts = script.with_suffix("").relative_to(package.parent).parts
    return f"python -m {'.'.join(part for part in parts if part != '__main__')}"


def _flags(section, prefix="--"):
    """The names of a dataclass's flags."""
    hints = typing.get_type_hints(type(section), include_extras=True)
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            bare = tyro.conf.OmitArgPrefixes in getattr(hints[field.name], "__metadata__", ())
            yield from _flags(value, "--" if bare else f"{name}.")
        else:
            yield name


def _similar(word, flags):
    """The flag that a word may mean: one with the same last part, or a similar one; or None."""
    word, last = word.replace("-", "_"), lambda name: name.rpartition(".")[2].lstrip("-_")
    by_form = {flag.replace("-", "_"): flag for flag in flags}
    same = [form for form in by_form if last(form) == last(word)]
    close = difflib.get_close_matches(word, same or by_form, 1, 0 if same else 0.8)
    return by_form[close[0]] if close else None


def _with_paths(section):
    """The dataclass, in which the texts of URLs are paths on stores."""
    changed = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, Path):
            changed[field.name] = as_path(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Path):
            changed[field.name] = tuple(map(as_path, value))
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _with_paths(value)
    return dataclasses.replace(section, **changed)


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


def names(configs: Path) -> list[str]:
    """The names of the configs in a folder."""
    return sorted(file.stem for file in configs.glob("*.py"))


def from_file(spec: str, configs: Path = Path("configs")) -> Config:
    """The config of `NAME` or `FILE.py`, or of a variant of it, `NAME:variant`.

    The file is Python, and is executed: use only files that you trust.

    Args:
      spec: a path, or the name of a file in `configs`.
      configs: a folder of configs.

    Raises:
      FileNotFoundError: if there is no such file; names those that there are.
      ValueError: if it has no such variant.
    """
    name, _, variant = spec.partition(":")
    # From another directory, a path is looked for beside the folder too.
    places = [Path(name), configs / f"{name}.py", configs / name, configs.parent / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        there = ", ".join(names(configs)) or "none"
        raise FileNotFoundError(f"no config {name}; {configs} has {there}")
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
