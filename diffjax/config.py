"""Experiments as data: frozen dataclasses, from a file and the command line to JSON and back.

A file `configs/NAME.py` defines `get_config(variant="") -> Config`; the command line overrides
any field of it (`--config.target=x_0`). What its names mean, and what cannot run, is for
`experiment.py` to say.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import json
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import samplers, schedules, targets, weightings
from .data import DATASETS
from .data.images import UNREADABLE
from .models import MODELS, MLPConfig, SongUNetConfig, UNetConfig
from .parallel import RUNNERS, Distributed
from .writers import WRITERS


def _linear_betas(steps: int = 1000, start=1e-4, end=0.02, log_snr_max=24.0):
    return schedules.from_betas(schedules.linear_betas(steps, start, end), log_snr_max)


def _scaled_linear_betas(steps: int = 1000, start=0.00085, end=0.012, log_snr_max=24.0):
    return schedules.from_betas(schedules.scaled_linear_betas(steps, start, end), log_snr_max)


def _cosine_betas(steps: int = 1000, max_beta=0.999, log_snr_max=24.0):
    return schedules.from_betas(schedules.cosine_betas(steps, max_beta), log_snr_max)


def _weighting(weighting: Callable) -> Callable:
    """A function of a weighting's own options, with their defaults, that binds them."""

    def bind(**options):
        return functools.partial(weighting, **options)

    parameters = list(inspect.signature(weighting).parameters.values())[2:]
    vars(bind)["__signature__"] = inspect.Signature(parameters)
    return bind


SCHEDULES: dict[str, Callable] = {
    "cosine": schedules.cosine,
    "linear": schedules.linear,
    "sigmoid": schedules.sigmoid,
    "log_uniform": schedules.log_uniform,
    "rectified_flow": schedules.rectified_flow,
    "linear_betas": _linear_betas,
    "scaled_linear_betas": _scaled_linear_betas,
    "cosine_betas": _cosine_betas,
}
WEIGHTINGS: dict[str, Callable] = {
    "unit": lambda: None,
    "constant": _weighting(weightings.constant),
    "elbo": _weighting(weightings.elbo),
    "truncated_snr": _weighting(weightings.truncated_snr),
    "p2": _weighting(weightings.p2),
    "edm": _weighting(weightings.edm),
    "min_snr": weightings.min_snr,
    "sigmoid": weightings.sigmoid,
}
SAMPLERS: dict[str, Callable] = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "dpm_solver_pp_2m": samplers.dpm_solver_pp_2m,
    "dpm_solver_pp_2m_sde": samplers.dpm_solver_pp_2m_sde,
    "dpm_solver_pp_3m": samplers.dpm_solver_pp_3m,
    "edm": samplers.edm,
    "euler_maruyama": samplers.euler_maruyama,
    "heun": samplers.heun,
    "lms": samplers.lms,
    "predictor_corrector": samplers.predictor_corrector,
    "unipc": samplers.unipc,
}
BEST_TIMES = {
    "ancestral": "uniform",
    "ddim": "uniform",
    "dpm_solver_pp_2m": "log_snr",
    "dpm_solver_pp_2m_sde": "log_snr",
    "dpm_solver_pp_3m": "log_snr",
    "edm": "karras",
    "euler_maruyama": "log_snr",
    "heun": "uniform",
    "lms": "karras",
    "predictor_corrector": "uniform",
    "unipc": "log_snr",
}
"""The grid of times that each sampler's docstring says it wants."""
TIMES: dict[str, Callable] = {
    "uniform": lambda schedule, n: samplers.uniform_times(n),
    "log_snr": samplers.log_snr_times,
    "karras": samplers.karras_times,
}


def one_of(table: dict[str, Any]) -> Any:
    """A field's choices, for --help; `check` is what refuses others, with a message of its own."""
    return tyro.conf.arg(metavar="{" + ",".join(table) + "}")


def _option(word: str) -> tuple[str, int | float | str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r} is not NAME=VALUE")
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return name, number(value)
    return name, value


Options = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE ...]",
        instance_from_str=lambda words: dict(_option(word) for word in words),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda options: [f"{k}={v}" for k, v in options.items()],
    ),
]
"""Keyword arguments of a schedule, weighting or sampler: numbers, or names."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What to train on."""

    name: Annotated[str, one_of(DATASETS)] = "digits"
    """The data set."""
    path: Path | None = None
    """Its folder or file; None for the default place."""
    size: int | None = None
    """Side of the squares that the images of a folder are cropped and scaled to, or that those of
    another set are averaged down to; None: leave them, they are all of one size."""
    shape: tuple[int, ...] | None = None
    """Shape of an example, of which networks from files can tell without the data; None: whatever
    the data has."""
    channels: int | None = None
    """Channels of the images of a folder: 1, grey, or 3, RGB; None: 1 if all are grey, else 3."""
    unreadable: Annotated[str, one_of(dict.fromkeys(UNREADABLE))] = "refuse"
    """What to do if a file of a folder cannot be read: refuse to start, or skip it."""
    workers: int = 0
    """Processes that make batches (extra `data`); 0: a thread, which is enough for most."""
    flip: bool = False
    """Mirror images left to right at random."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam, its learning rate, and what is done to gradients before."""

    learning_rate: float = 1e-3
    """The peak."""
    warmup: int = 100
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """Step at which a cosine decay from the peak reaches 0; None: stay at the peak."""
    clip: float | None = 1.0
    """Largest global norm of the gradient."""
    beta_1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta_2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    accumulate: int = 1
    """Parts that each device takes its share of the batch in, one after the other."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How samples are made, at intervals and at the end."""

    sampler: Annotated[str, one_of(SAMPLERS)] = "ddim"
    """The sampler."""
    options: Options = dataclasses.field(default_factory=dict)
    """Its options."""
    times: Annotated[str, one_of(TIMES)] = "uniform"
    """The grid of times."""
    steps: int = 50
    """Steps of the grid."""
    guidance: float = 1.0
    """Weight of classifier-free guidance; 1: none."""
    columns: int = 10
    """Columns of the picture. With labels one row for each class, else as many as columns."""
    level: float = 0.0
    """Noise on the small image of super-resolution: the time it is diffused to, at most augment."""
    score: int = 0
    """Samples to measure at the end (Frechet distance, accuracy on the labels); 0: none."""


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment. When a run is resumed, what `CHANGEABLE` lists may be changed."""

    data: Data = Data()
    target: Annotated[str, one_of(targets.TARGETS)] = "eps"
    """What the network predicts."""
    unit_output: bool = False
    """Scale the network's output to the target's size (a score then is eps in disguise)."""
    unit_input: bool = False
    """Scale the network's input to variance one, for data of standard deviation 0.5 (EDM, with
    target F)."""
    time_input: bool = False
    """Show the network its discrete time, 0 to time_steps - 1 (DDPM), in place of log-SNR."""
    schedule: Annotated[str, one_of(SCHEDULES)] = "cosine"
    """The noise schedule."""
    schedule_options: Options = dataclasses.field(default_factory=dict)
    """Its options."""
    schedule_shift: float = 0.0
    """Added to its log-SNR at every time."""
    time_steps: int | None = None
    """Train on the grid i/T of discrete time with this T; None: continuous time."""
    weighting: Annotated[str, one_of(WEIGHTINGS)] = "unit"
    """Weight of the loss over log-SNR; unit: each target scaled to variance one."""
    weighting_options: Options = dataclasses.field(default_factory=dict)
    """Its options."""
    bound_weight: float | None = None
    """Learn the decoder's variance too, by this weight on the bound (0.001 in improved DDPM); it
    needs time_steps, and a model of twice the data's out_channels. None: do not."""
    loss_aware_times: bool = False
    """Draw times where the loss has been large; it needs time_steps."""
    label_drop: float = 0.1
    """Probability of training without the label, where the model has a null label."""
    low: int | None = None
    """Super-resolution: side of the small image, a mean of the data's, that the network is given;
    it needs model.image_cond. None: it is given none."""
    augment: float = 0.0
    """Noise on the small image in training: it is diffused to a time between 0 and this one."""
    model: UNetConfig | SongUNetConfig | MLPConfig = UNetConfig()  # noqa: RUF009, it is frozen
    optimizer: Optimizer = Optimizer()
    ema: float = 0.999
    """Decay of the moving average of parameters."""
    batch_size: int = 128
    """Examples per step, over all devices."""
    seed: int = 0
    """Seed of everything random."""

    steps: int = 1000
    """Training steps in all."""
    parallel: Annotated[str, one_of(RUNNERS)] = "pmap"
    """The runner."""
    fsdp: int = 1
    """Devices that share one copy of the state, with parallel=sharded; 0: all of them."""
    steps_per_call: int = 1
    """Steps in one call of the compiled program, for a GPU or TPU that takes a step sooner than the
    host can ask for one. Nothing is won on a CPU."""
    log_every: int = 50
    """Steps between lines of metrics."""
    eval_every: int = 500
    """Steps between losses on held-out data."""
    sample_every: int = 1000
    """Steps between pictures of samples."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Keep besides each checkpoint whose step is a multiple of this."""
    keep_best: int = 0
    """Keep besides so many of least loss on held-out data; save_every must be a multiple of
    eval_every."""
    skip_nonfinite: int = 0
    """Batches of infinite or undefined loss or gradient to leave out before the run stops."""
    sampling: Sampling = Sampling()
    writers: Annotated[tuple[str, ...], one_of(WRITERS)] = ()
    """Where metrics and pictures go besides the run's directory."""


CHANGEABLE = {
    "steps",
    "parallel",
    "fsdp",
    "steps_per_call",
    "log_every",
    "eval_every",
    "sample_every",
    "save_every",
    "keep",
    "keep_every",
    "keep_best",
    "skip_nonfinite",
    "sampling",
    "writers",
    "data.path",
    "data.workers",
}
"""What a resumed run may have otherwise than the run it continues."""


def smoke(config: Config, **changes: Any) -> Config:
    """The same experiment in seconds: a few steps, a checkpoint every 20, few samples."""
    sampling = dataclasses.replace(config.sampling, steps=4, columns=2, score=0)
    short = dict(steps=60, batch_size=16, log_every=10, eval_every=20, sample_every=40)
    short |= dict(save_every=20, keep=3, sampling=sampling) | changes
    return dataclasses.replace(config, **short)


def parse(
    argv: Sequence[str], default: str = "configs/digits.py"
) -> tuple[Config, Path, Distributed, int]:
    """The command line `[--config=FILE[:variant]] [--workdir=DIR] [--config.FIELD=VALUE ...]`.

    Returns:
      The config, not yet checked; the run's directory, `runs/<config name>` by default; which of
      how many processes this is; and how many steps to trace.

    Raises:
      SystemExit: after printing what is wrong (or the help) in a few lines.
    """
    file, rest = _take(argv, "--config", default)
    try:
        base = from_file(file)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    path = file.partition(":")[0]

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        config: tyro.conf.AvoidSubcommands[Config] = base
        workdir: Path = Path("runs") / Path(path).stem
        """Where checkpoints, metrics and pictures go; resumes what it finds there."""
        distributed: Distributed = Distributed()  # noqa: RUF009, it is frozen
        profile: int = 0
        """Trace so many steps, from the tenth on, into WORKDIR/profile."""

    args = tyro.cli(
        Arguments,
        args=rest,
        description=f"--config=FILE[:variant] chooses the experiment; this is {file}. "
        "Every field of it can be changed:",
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )
    if args.profile < 0:
        sys.exit(f"error: profile={args.profile}: must be at least 0, the number of steps to trace")
    return args.config, args.workdir, args.distributed, args.profile


@contextlib.contextmanager
def plainly(*errors: type[Exception]) -> Iterator[None]:
    """End the program with one line, "error: ...", at an error of these kinds.

    By default at those that what the user gave may cause: ValueError and OSError.
    """
    kinds = errors or (ValueError, OSError)
    try:
        yield
    except kinds as error:
        sys.exit(f"error: {error}")


def from_file(spec: str) -> Config:
    """The config of `FILE.py` or `FILE.py:variant`.

    The file is Python, and is executed: run your own.

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


def variant_of(config: Config, variant: str, **variants: Callable[[], Config]) -> Config:
    """Choose a variant of a config file: "" is `config` itself, the others are made on demand.

    Raises:
      ValueError: if there is no such variant.
    """
    if not variant:
        return config
    if variant not in variants:
        raise ValueError(f"no variant {variant!r}: one of {', '.join(variants)}, or none")
    return variants[variant]()


def to_json(config: Config) -> str:
    """The config as JSON; `from_json` is its inverse."""
    tree = dataclasses.asdict(config)
    tree["model"] = {"kind": type(config.model).__name__} | tree["model"]
    return json.dumps(tree, indent=2, default=str) + "\n"


def from_json(text: str) -> Config:
    """The config of `to_json`.

    Raises:
      ValueError: if a field is unknown, as when another version wrote it.
    """
    tree = json.loads(text)
    kinds = {c.__name__: c for c in MODELS}
    model = tree.pop("model")
    return dataclasses.replace(
        _from_dict(Config, tree), model=_from_dict(kinds[model.pop("kind")], model)
    )


def differences(old: Config, new: Config) -> list[str]:
    """What differs and may not when a run is resumed, a line each; empty if nothing does."""
    changeable = lambda name: any(name == c or name.startswith(c + ".") for c in CHANGEABLE)
    lines = unlike(fields(old), fields(new), "the run has {!r}, asked for {!r}")
    return [line for name, line in lines.items() if not changeable(name)]


def unlike(has: dict[str, Any], wanted: dict[str, Any], says: str) -> dict[str, str]:
    """A line, by name, wherever two flat dicts differ: `says` of both values, None if missing.

    >>> unlike({"a": 1, "b": 2}, {"b": 3, "a": 1}, "{} is not {}")
    {'b': 'b: 2 is not 3'}
    """
    return {
        name: f"{name}: {says.format(has.get(name), wanted.get(name))}"
        for name in sorted(has.keys() | wanted.keys())
        if has.get(name) != wanted.get(name)
    }


def fields(config: Config) -> dict[str, Any]:
    """Every field by its full name, as in `model.width`, as JSON has it."""
    return flatten(json.loads(to_json(config)))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """What nested dicts hold, by full names.

    >>> flatten({"model": {"width": 8}, "seed": 0})
    {'model.width': 8, 'seed': 0}
    """
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, sub in tree.items() for k, v in flatten(sub, f"{prefix}{name}.").items()}


def _from_dict(cls, tree):
    hints = typing.get_type_hints(cls)
    unknown = set(tree) - set(hints)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    return cls(**{name: _from_value(hints[name], value) for name, value in tree.items()})


def _from_value(hint, value):
    if dataclasses.is_dataclass(hint):
        return _from_dict(hint, value)
    kinds = (hint, *typing.get_args(hint))
    if any(typing.get_origin(kind) is tuple for kind in kinds) and value is not None:
        return tuple(value)
    if Path in kinds and value is not None:
        return Path(value)
    return value


def _take(argv, name, default):
    """Take `name=VALUE` or `name VALUE` out of argv."""
    rest, value = [], default
    words = iter(argv)
    for word in words:
        if word == name:
            value = next(words, default)
        elif word.startswith(name + "="):
            value = word.removeprefix(name + "=")
        else:
            rest.append(word)
    return value, rest
