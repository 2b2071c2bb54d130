"""Experiments as data: frozen dataclasses, and their JSON.

A file `configs/NAME.py` defines `get_config(variant="") -> Config`, and the command line overrides
any field of it (`--config.target=x_0`). The rules of one section stand beside its fields; the rules
across sections are in `rules`, and `functions.resolve` turns names into functions.
"""

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Union

import tyro

from .. import flow_maps
from ..augmentations import AUGMENTATIONS
from ..couplings import COUPLINGS
from ..data import DATASETS, ORDERS, check_workers
from ..data.images import CROPS, UNREADABLE
from ..densities import DENSITIES
from ..flow_maps import IDENTITIES
from ..guidance import GUIDANCES, STEP_GUIDANCES
from ..latents import LATENTS
from ..models import MODELS, ModelConfig, UNetConfig, name_of
from ..samplers import SAMPLERS, TIMES
from ..schedules import LONGEST as LONGEST_GRID, SCHEDULES
from ..targets import TARGETS, unbounded
from ..training import parsing
from ..training.averaging import DTYPES
from ..training.files import flatten, unequal
from ..training.runners import RUNNERS
from ..training.store import as_path
from ..training.writers import WRITERS
from ..weightings import WEIGHTINGS

if TYPE_CHECKING:
    Model = ModelConfig
else:  # tyro and `from_json` choose among the configs in the table
    Model = Union[tuple(row.config for row in MODELS.values())]  # noqa: UP007


LARGEST = 2**28
"""The largest number of elements of an example."""


def one_of(table: Iterable[str]) -> Any:
    """The choices of a field, for --help. `check` refuses others, with a message of its own."""
    return tyro.conf.arg(metavar="{" + ",".join(table) + "}")


def number_or_text(word: str) -> int | float | str:
    """A word of the command line as the number that it is, else as text."""
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(word)
    return word


def as_options(words: Iterable[str]) -> dict[str, Any]:
    """Words `NAME=VALUE` as a dict.

    Raises:
      ValueError: if a word is none of these, or a name is there twice.

    >>> as_options(["eta=0.5", "variance=beta"])
    {'eta': 0.5, 'variance': 'beta'}
    """
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not NAME=VALUE")
        if name in options:
            raise ValueError(f"{word!r}: {name} is there twice")
        options[name] = number_or_text(value)
    return options


def as_chain(words: Iterable[str | float]) -> tuple[str, ...]:
    """A chain of guidances, `NAME:OPTION=VALUE,...` each; a number is a weight of classifier_free.

    >>> as_chain(["3"]), as_chain(["classifier_free:weight=3", "within:low=-2,high=4"])
    (('classifier_free:weight=3',), ('classifier_free:weight=3', 'within:low=-2,high=4'))
    >>> as_chain(["1"])  # a weight of 1 is no guidance
    ()
    """
    chain = []
    for word in words:
        value = number_or_text(str(word))
        if isinstance(value, str):
            chain.append(value)
        elif value != 1:
            chain.append(f"classifier_free:weight={value:g}")
    return tuple(chain)


def parse_guidance(word: str) -> tuple[str, dict[str, Any]]:
    """One guidance of a chain as its name and its options.

    >>> parse_guidance("within:low=-2,high=4")
    ('within', {'low': -2, 'high': 4})
    """
    name, _, options = word.partition(":")
    return name, as_options(options.split(",") if options else ())


class Weaker(NamedTuple):
    """The network that autoguidance guides away from.

    Attributes:
      source: what `checkpoint.load` takes: a run's directory, an exported file or a name.
      average: the relative width of the average of its parameters; None: the moving average.
    """

    source: str
    average: float | None


def take_weaker(name: str, options: dict[str, Any]) -> tuple[dict[str, Any], Weaker | None]:
    """The options of a guidance without those that say which network is the weaker one, and that.

    >>> take_weaker("autoguidance", {"weight": 2, "weaker": "runs/small", "average": 0.2})
    ({'weight': 2}, Weaker(source='runs/small', average=0.2))

    Raises:
      ValueError: if autoguidance has no weaker network, or its average is no number.
    """
    if name != "autoguidance":
        return options, None
    source, average = options.get("weaker"), options.get("average")
    if source is None:
        raise ValueError(
            "guidance autoguidance needs weaker=RUN, the directory of a smaller or less trained "
            "run, or an exported file"
        )
    if average is not None and not parsing.is_of(average, int, float):
        raise ValueError(f"guidance autoguidance: average={average}: must be a number")
    rest = {k: v for k, v in options.items() if k not in ("weaker", "average")}
    return rest, Weaker(str(source), average)


def learned_weight(guidance: tuple[str, ...]) -> float:
    """The weight that a chain of guidances gives to a flow map that has learned guidance.

    Raises:
      ValueError: if the chain is more than one weight of classifier_free.

    >>> learned_weight(("classifier_free:weight=3",)), learned_weight(())
    (3.0, 1.0)
    """
    names = [parse_guidance(word) for word in guidance]
    match names:
        case []:
            return 1.0
        case [("classifier_free", {"weight": int() | float() as weight, **others})] if not others:
            return float(weight)
    raise ValueError(f"guidance {' '.join(guidance)}: need one weight of classifier_free")


Options = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE ...]",
        instance_from_str=as_options,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda options: [f"{k}={v}" for k, v in options.items()],
    ),
]
"""Keyword arguments of a schedule, weighting or sampler: numbers, or names."""

Guidance = Annotated[
    tuple[str, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[{" + ",".join(GUIDANCES | STEP_GUIDANCES) + "}:OPTION=VALUE,... ...]",
        instance_from_str=as_chain,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=list,
    ),
]
"""A chain of guidances, the first applied first."""


def require(*rules: tuple[bool, str]) -> None:
    """Raise a ValueError with the message of the first rule that does not hold."""
    for holds, message in rules:
        if not holds:
            raise ValueError(message)


def at_least(section: Any, prefix: str = "", **least: float) -> None:
    """Raise a ValueError if a field of a dataclass is below its least value, and is not None."""
    for name, bound in least.items():
        value = getattr(section, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{prefix}{name}={value}: must be at least {bound}")


def known_name(kind: str, table: Iterable[str], name: str) -> None:
    """Raise a ValueError, with the choices, unless a table has the name."""
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}: one of {', '.join(table)}")


@dataclasses.dataclass(frozen=True)
class Data:
    """The data to train on."""

    name: Annotated[str, one_of(DATASETS)] = "digits"
    """The data set."""
    path: Path | None = None
    """Its folder or file; None: its default place."""
    cache: Path | None = None
    """Local folder to which records in a bucket are copied; needed only if `path` is a bucket."""
    size: int | None = None
    """Side of the squares that the images of a folder are cropped and scaled to, or that those of
    another set are averaged down to; None: leave the images as they are, all of one size."""
    shape: tuple[int, ...] | None = None
    """Shape of an example, which a run records so that its network can be used without its data;
    None: the shape that the data has. An archive npz of this shape is not read as grey images."""
    channels: int | None = None
    """Channels of the images of a folder: 1, grey, or 3, RGB; None: 1 if all are grey, else 3."""
    unreadable: Annotated[str, one_of(UNREADABLE)] = "refuse"
    """Whether to refuse a folder in which a file cannot be read, or to skip the file."""
    crop: Annotated[str, one_of(CROPS)] = "square"
    """How the images of a folder are made squares of `size`; adm: as ADM does (DiT, EDM2)."""
    order: Annotated[str | None, one_of(ORDERS)] = None
    """Order of the examples in an epoch; None: shuffle, or feistel, which takes no memory and which
    a run then records, for more than 4 million examples."""
    workers: int = 0
    """Processes that make batches (extra `data`); 0: a thread, which is usually enough."""
    flip: bool = False
    """Mirror images left to right at random."""
    latents: Annotated[str | None, one_of(LATENTS)] = None
    """The convention of stored latents, which are means and standard deviations in float16, drawn
    anew in each step: their scale, and the range of the images. None: the data are no latents."""
    autoencoder: Path | None = None
    """The folder or file of the autoencoder that makes images of latents; None: samples stay
    latents."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images, if `shape` or `size` says them."""
        if self.shape is not None:
            return (self.shape[0], self.shape[1]) if len(self.shape) == 3 else None
        return None if self.size is None else (self.size, self.size)

    def check(self) -> None:
        """Raise a ValueError if the section is impossible whatever the other sections are."""
        known_name("data set", DATASETS, self.name)
        check_workers(self.workers)
        if self.order is not None:
            known_name("order", ORDERS, self.order)
        if self.latents is not None:
            known_name("latents", LATENTS, self.latents)
        require(
            (
                self.latents is not None or self.autoencoder is None,
                f"data.autoencoder={self.autoencoder}: needs data.latents, one of "
                f"{', '.join(LATENTS)}",
            ),
            (
                self.latents is None or not self.flip,
                "data.flip=True: the latent of a mirrored image is not the mirrored latent; store "
                "the latents of the mirrored images too",
            ),
            (
                self.latents is None or self.size is None,
                f"data.size={self.size}: latents are not averaged; encode smaller images",
            ),
        )
        if self.shape is not None and not (
            min(self.shape, default=0) >= 1 and math.prod(self.shape) <= LARGEST
        ):
            raise ValueError(
                f"data.shape={self.shape}: need axes of at least 1, and {LARGEST} numbers at most"
            )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam, its learning rate, and the clipping of gradients."""

    learning_rate: float = 1e-3
    """Learning rate after the warm-up."""
    warmup: int = 100
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """Step at which a cosine decay of the learning rate reaches 0; None: no decay."""
    inverse_sqrt_from: int | None = None
    """Step from which the learning rate falls as the inverse square root of the step (EDM2); None:
    it does not."""
    clip: float | None = 1.0
    """Largest global norm of the gradient; None: no clipping."""
    beta_1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta_2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    schedule_factor: float = 1.0
    """Factor on the learning rate for a learned schedule, schedule=monotone."""
    accumulate: int = 1
    """Parts into which each device splits its share of the batch, to process one after another."""

    def check(self) -> None:
        """Raise a ValueError if the section is impossible whatever the other sections are."""
        at_least(self, "optimizer.", warmup=0, weight_decay=0, accumulate=1, inverse_sqrt_from=1)
        require(
            (
                0 < self.learning_rate < math.inf,
                f"optimizer.learning_rate={self.learning_rate}: must be positive and finite",
            ),
            (
                0 < self.schedule_factor < math.inf,
                f"optimizer.schedule_factor={self.schedule_factor}: must be positive and finite",
            ),
            (
                self.clip is None or self.clip > 0,
                f"optimizer.clip={self.clip}: must be positive, or None",
            ),
            (
                self.decay_steps is None or self.decay_steps > self.warmup,
                f"optimizer.decay_steps={self.decay_steps}: must exceed warmup={self.warmup}, or "
                "be None",
            ),
            (
                None in (self.decay_steps, self.inverse_sqrt_from),
                f"optimizer.decay_steps={self.decay_steps} and inverse_sqrt_from="
                f"{self.inverse_sqrt_from}: the learning rate decays in one way, give one of them",
            ),
            (
                0 <= self.beta_1 < 1 and 0 <= self.beta_2 < 1,
                f"optimizer.beta_1={self.beta_1}, beta_2={self.beta_2}: must be in [0, 1)",
            ),
        )


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a sample is drawn. Every field here is a flag of sample.py and evaluate.py too."""

    sampler: Annotated[str, one_of(SAMPLERS)] = "ddim"
    """The sampler."""
    options: Options = dataclasses.field(default_factory=dict)
    """Options of the sampler."""
    times: Annotated[str | None, one_of(TIMES)] = None
    """The grid of times; None: the grid that suits the sampler best."""
    steps: int = 50
    """Steps of the grid."""
    guidance: Guidance = ()
    """A chain of guidances, such as classifier_free:weight=3 within:low=-2,high=4. A number alone
    is the weight of classifier_free; autoguidance:weight=2,weaker=RUN,average=0.1 names a run, and
    may name an average of its parameters. In super-resolution, without=label, image or both
    chooses the condition that the unguided prediction omits. Empty: no guidance."""
    cond_noise: float = 0.0
    """Super-resolution: the time to which the low-resolution image is diffused, at most
    max_cond_noise."""
    overlap: int | None = None
    """With augmentation=window: pixels by which the windows of a sample overlap; None: half of
    their side."""
    cascade: tuple[str, ...] = ()
    """Super-resolution: the runs that draw the low-resolution image, named as sample.py's --workdir
    is, smallest first; each enlarges what the one before has drawn, by its own settings. Empty:
    pictures enlarge held-out images, and the run cannot draw samples by itself."""

    def check(self) -> None:
        """Raise a ValueError if the section is impossible whatever the other sections are."""
        known_name("sampler", SAMPLERS, self.sampler)
        if self.times is not None:
            known_name("times", TIMES, self.times)
        at_least(self, "sampling.", steps=1)
        if self.steps > LONGEST_GRID:
            raise ValueError(f"sampling.steps={self.steps}: must be at most {LONGEST_GRID}")

    @property
    def grid(self) -> str:
        """The name of the grid of times in use."""
        return self.times or SAMPLERS[self.sampler].times


@dataclasses.dataclass(frozen=True)
class Sampling(Walk):
    """How a run draws samples, at intervals and at the end."""

    columns: int = 10
    """Columns of the picture. It has a row for each class if there are 20 or fewer, else as many
    rows as columns."""
    eval_samples: int = 0
    """Samples to evaluate at the end of the run (Frechet distance, accuracy of labels); 0: none."""

    def check(self) -> None:
        """Raise a ValueError if the section is impossible whatever the other sections are."""
        super().check()
        at_least(self, "sampling.", columns=1, eval_samples=0)
        require(
            (
                self.eval_samples != 1,
                "sampling.eval_samples=1: a distance needs at least 2; 0 evaluates none",
            )
        )


@dataclasses.dataclass(frozen=True)
class Eval:
    """How a run measures the distance of its samples to data, at intervals."""

    features: str | None = None
    """The feature space, as evaluate.py has them: inception for FID; None: measure nothing."""
    weights: Path | None = None
    """The file with the weights of inception or dinov2."""
    reference: str = "train"
    """What samples are compared with: train, test, or a file of statistics."""
    every: int = 10_000
    """Steps between measurements, beside the one at the end."""
    n: int = 10_000
    """Number of samples that are drawn for each; the distance depends on it."""

    def check(self) -> None:
        """Raise a ValueError if the section is impossible whatever the other sections are."""
        at_least(self, "eval.", every=1, n=20)
        require(
            (
                self.reference in ("train", "test") or self.reference.endswith((".npz", ".pkl")),
                f"eval.reference={self.reference!r}: one of train, test, or a file .npz or .pkl",
            ),
            (
                self.weights is None or self.features is not None,
                f"eval.weights={self.weights}: needs eval.features",
            ),
        )


OBJECTIVES = ("denoising", "flow_map")
"""What training minimises: the denoising loss, or that of a flow map."""


def _teacher(x_t, t, cond=None):
    """In place of a teacher that is not loaded yet."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FlowMap:
    """How a flow map is learned, with objective=flow_map."""

    identity: Annotated[str, one_of(IDENTITIES)] = "lagrangian"
    """The identity of exact flow maps whose residual is minimised."""
    velocity: str = "own"
    """The velocity that it needs: own (the map's, where both times are equal), pair (that of the
    drawn data and noise), or a teacher, as sample.py's --workdir has it: a run's directory, an
    exported file, or the name of a network that comes with diffjax."""
    guidance: Guidance = ()
    """The teacher's guidance, which the map learns; a number is a weight."""
    guidance_to: float | None = None
    """Learn the teacher's classifier-free guidance of every weight from 1 to this one instead, and
    give the network the weight; it needs model.guidance_weight. --guidance W then chooses one."""
    first: float | None = None
    """The first of two steps, as a share of both: 0.5 for shortcut models and progressive
    distillation, a small one for consistency models. None: it is drawn at random."""
    diagonal: float = 0.75
    """Fraction of examples with two equal times, from which the map learns to denoise."""
    to_data: float = 0.0
    """Fraction of examples whose step ends at time 0; the other ends are uniform."""
    normalise: float = 0.0
    """Power p of a factor 1 / (loss + 0.001)^p on each loss whose regression target has no
    noise."""
    start: str | None = None
    """A trained network whose parameters the map starts from, named as a teacher is; its model is
    the map's, with or without the second time. None: new parameters."""

    def check(self) -> None:
        """Raise a ValueError if the section is impossible whatever the other sections are."""
        velocity = self.velocity if self.velocity in ("own", "pair") else _teacher
        sizes = self.first, self.diagonal, self.to_data, self.normalise
        flow_maps.check(self.identity, velocity, *sizes)
        to = self.guidance_to
        names = {word.partition(":")[0] for word in self.guidance}
        unfit = sorted(names & {*STEP_GUIDANCES, "autoguidance"})
        require(
            (
                not unfit,
                f"flow_map.guidance={' '.join(self.guidance)}: {', '.join(unfit)} needs a step, or "
                "a weaker network; guide a teacher by others",
            ),
            (
                to is None or (1 < to < math.inf and velocity is _teacher and not self.guidance),
                f"flow_map.guidance_to={to}: must be above 1, with a teacher "
                f"(flow_map.velocity={self.velocity}) and without flow_map.guidance",
            ),
            (
                velocity is _teacher or not self.guidance,
                f"flow_map.guidance={' '.join(self.guidance)}: needs a teacher, "
                f"not flow_map.velocity={self.velocity}",
            ),
        )


BEST = ("eval_loss", "eval_frechet")
"""The metrics by which the best checkpoints can be chosen; the lowest is the best."""


@dataclasses.dataclass(frozen=True)
class Config:
    """An experiment. When a run is resumed, the fields in `CHANGEABLE` may change."""

    data: Data = Data()
    objective: Annotated[str, one_of(OBJECTIVES)] = "denoising"
    """What to learn: a denoiser, or a flow map, which draws samples in one step or a few."""
    flow_map: FlowMap = FlowMap()
    target: Annotated[str, one_of(TARGETS)] = "eps"
    """What the network predicts."""
    unit_output: bool | None = None
    """Scale the network's output to the target's standard deviation (for a score: divide by sigma).
    None: a score is scaled, unless its variance is learned too, and no other target is. False: the
    raw score, which the network must scale by itself."""
    unit_input: bool = False
    """Scale the network's input to variance one, for data of standard deviation 0.5 (EDM, with
    target F)."""
    time_input: bool = False
    """Give the network its discrete time, 0 to time_steps - 1 (DDPM), in place of log-SNR."""
    fourier_features: tuple[int, ...] = ()
    """Give the network sin and cos(2^n pi x_t) beside x_t, for each of these n (VDM: 7 8); it needs
    model.out_channels. Empty: none."""
    schedule: Annotated[str, one_of(SCHEDULES)] = "cosine"
    """The noise schedule. monotone is learned beside the network, from the bound and the variance
    of its estimate (VDM); it needs weighting=elbo."""
    schedule_options: Options = dataclasses.field(default_factory=dict)
    """Options of the schedule."""
    schedule_shift: float = 0.0
    """A constant added to the schedule's log-SNR at every time."""
    schedule_base: int | None = None
    """Side of the images that the schedule is meant for: it is shifted so that images that are
    averaged down to this side have its signal-to-noise ratio (simple diffusion; SD3); it needs
    data.size, or data.shape. None: the schedule is not shifted by the size of the images."""
    time_steps: int | None = None
    """Train on the grid i/T of discrete time with this T; None: continuous time."""
    weighting: Annotated[str, one_of(WEIGHTINGS)] = "unit"
    """Weight of the loss over log-SNR; unit: each target scaled to variance one."""
    weighting_options: Options = dataclasses.field(default_factory=dict)
    """Options of the weighting."""
    density: Annotated[str, one_of(DENSITIES)] = "uniform"
    """The density of noise levels in training; uniform: of uniform times."""
    density_options: Options = dataclasses.field(default_factory=dict)
    """Options of the density."""
    density_weights: bool = True
    """Divide each loss by the density of its time, so that the density changes how much the loss
    varies, and not its mean; False: the density is a part of the objective, as EDM's is."""
    coupling: Annotated[str, one_of(COUPLINGS)] = "independent"
    """Which noise each example is given in training: its own, or one that is near it. With another
    than independent, samples are drawn by deterministic samplers, and there is no bound."""
    coupling_options: Options = dataclasses.field(default_factory=dict)
    """Options of the coupling."""
    bound_weight: float | None = None
    """Learn the decoder's variance too, with this weight on the bound (0.001 in improved DDPM); it
    needs time_steps, and a model whose out_channels are twice the data's. None: do not learn it."""
    learned_uncertainty: bool = False
    """Learn u, a function of log-SNR, beside the network, and minimise exp(-u) loss + u, so that
    every noise level contributes equally (EDM2). Reported losses are without u."""
    loss_aware_times: bool = False
    """Draw times more often where the loss has been large; it needs time_steps."""
    augmentation: Annotated[str | None, one_of(AUGMENTATIONS)] = None
    """What is done to the images of training at random. A network with model.augment_dim is told of
    it, so that it does not leak into the samples; edm has 9 such numbers, crop 2, and window, whose
    samples are drawn by overlapping windows, 2. None: nothing."""
    augmentation_options: Options = dataclasses.field(default_factory=dict)
    """Options of the augmentation."""
    label_drop: float = 0.1
    """Probability of training without the label, where the model has a null label."""
    low_resolution: int | None = None
    """Super-resolution: height of the low-resolution image, averaged from the data's, that the
    network is given, or of which it is given the part in its window; it needs model.image_cond.
    None: no super-resolution."""
    low_resolution_drop: float = 0.0
    """Probability of training with a low-resolution image that is all noise, which is what guidance
    compares with. The label is dropped by the same random number, so that with equal probabilities
    the two are dropped together."""
    max_cond_noise: float = 0.0
    """Noise on the low-resolution image in training: it is diffused to a random time between 0 and
    this one."""
    model: Model = UNetConfig()  # noqa: RUF009, it is frozen
    """The network and its options; on the command line, --config.model=NAME chooses another."""
    optimizer: Optimizer = Optimizer()
    ema: float = 0.999
    """Decay of the moving average of parameters."""
    ema_warmup: bool = True
    """Let the decay grow with the step k, min(ema, (1 + k) / (10 + k)), so that the average forgets
    the initial parameters; it holds a decay above 1 - 9 / (10 + steps) back for the whole run.
    False: the decay is constant."""
    averages: tuple[float, ...] = ()
    """Relative widths of power-function averages to track, such as 0.05 0.1, from whose snapshots
    averages of other widths are made after training. Empty: none."""
    snapshot_every: int | None = None
    """Steps between snapshots of these averages; there is one at the end too."""
    snapshot_dtype: Annotated[str, one_of(DTYPES)] = "float32"
    """The numbers in snapshots; float16 takes half the space."""
    batch_size: int = 128
    """Examples per step, over all devices."""
    seed: int = 0
    """Seed of everything random."""

    steps: int = 1000
    """Training steps in all."""
    parallel: Annotated[str | None, one_of(RUNNERS)] = None
    """What maps the step over the devices: pmap, or sharded, which is jax.jit over a mesh. None:
    what a run that is resumed has; else pmap in one process, and sharded among several or with
    fsdp."""
    fsdp: int = 1
    """Devices that share one copy of the state, which pmap cannot do; 0: all of them."""
    steps_per_call: int = 1
    """Steps in one call of the compiled program, for a GPU or TPU that makes a step faster than the
    host can start one. It gains nothing on a CPU."""
    log_every: int = 50
    """Steps between lines of metrics."""
    eval_every: int = 500
    """Steps between losses on held-out data."""
    sample_every: int = 1000
    """Steps between pictures of samples."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_best: int = 0
    """Also keep this many checkpoints that are best by keep_best_by; save_every must be a multiple
    of eval_every, or of eval.every."""
    keep_best_by: Annotated[str, one_of(BEST)] = "eval_loss"
    """What the best checkpoints have the lowest of: the held-out loss, or the Frechet distance of
    the section eval."""
    skip_nonfinite: int = 0
    """Number of batches with an infinite or undefined loss or gradient to skip before the run
    stops."""
    sampling: Sampling = Sampling()
    eval: Eval = Eval()
    writers: Annotated[tuple[str, ...], one_of(WRITERS)] = ()
    """Where metrics and pictures go beside the run's directory."""

    @property
    def scales_output(self) -> bool:
        """Whether the network's output is scaled to the target's standard deviation."""
        if self.unit_output is None:
            return unbounded(self.target) and self.bound_weight is None
        return self.unit_output

    @property
    def given_height(self) -> int | None:
        """The height of the images that samples enlarge, if no cascade draws them; or None."""
        return None if self.sampling.cascade else self.low_resolution

    @property
    def learns_schedule(self) -> bool:
        """Whether the schedule is learned beside the network."""
        return self.schedule == "monotone"


CHANGEABLE = {
    "steps",
    "model.remat",
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
    "eval.every",
    "eval.weights",
    "writers",
    "data.path",
    "data.cache",
    "data.autoencoder",
    "data.shape",
    "data.workers",
}
"""Fields that may change when a run is resumed."""


def smoke(config: Config, **changes: Any) -> Config:
    """The same experiment in seconds: a few steps, a checkpoint every 20, few samples."""
    sampling = dataclasses.replace(config.sampling, steps=4, columns=2, eval_samples=0)
    short = dict(steps=60, batch_size=16, log_every=10, eval_every=20, sample_every=40)
    short |= dict(snapshot_every=20 if config.averages else None)
    short |= dict(save_every=20, keep=3, sampling=sampling) | changes
    return dataclasses.replace(config, **short)


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


LONGEST = 64
"""The largest number of entries of a list in a file."""
LONGEST_NAME = 500
"""The largest number of letters of a name in a file."""
RENAMED = {
    "low": "low_resolution",
    "augment": "max_cond_noise",
    "sampling.level": "sampling.cond_noise",
    "sampling.score": "sampling.eval_samples",
    "model.level_scale": "model.log_snr_scale",
    "model.level_shift": "model.log_snr_shift",
    "model.level_period": "model.embedding_period",
    "model.image_level": "model.embed_image_log_snr",
}
"""Fields that version 0.1 wrote under another name."""


def to_json(config: Config) -> str:
    """The config as JSON; `from_json` is its inverse."""
    tree = dataclasses.asdict(config)
    tree["model"] = {"kind": name_of(config.model)} | tree["model"]
    return json.dumps(tree, indent=2, default=str) + "\n"


def to_tree(config: Config) -> dict[str, Any]:
    """The config as a tree of JSON values; `from_tree` is its inverse."""
    return json.loads(to_json(config))


def from_json(text: str) -> Config:
    """The config that `to_json` wrote, in this version or an earlier one.

    Raises:
      ValueError: if it is not JSON, or a field is unknown or of another type; names the field.
    """
    return from_tree(parsing.parse(text))


def from_tree(tree: Any) -> Config:
    """The config of a tree of JSON values; see `from_json`."""
    if not isinstance(tree, dict):
        raise parsing.mismatch("the config", tree, "an object")
    tree = _upgraded(tree)
    model = parsing.field(tree, "model", dict)
    kind = parsing.field(model, "kind", str)
    known_name("model", MODELS, kind)
    config = _from_dict(Config, {k: v for k, v in tree.items() if k != "model"})
    model = {k: v for k, v in model.items() if k != "kind"}
    return dataclasses.replace(config, model=_from_dict(MODELS[kind].config, model, "model."))


def differences(old: Config, new: Config) -> list[str]:
    """A line for each difference that a resumed run may not have."""
    changeable = lambda name: any(name == c or name.startswith(c + ".") for c in CHANGEABLE)
    lines = unequal(fields(old), fields(new), "the run has {!r}, asked for {!r}")
    return [line for name, line in lines.items() if not changeable(name)]


def fields(config: Config) -> dict[str, Any]:
    """Every field by its full name, as in `model.width`, with its value in JSON.

    `unit_output` has the value that it stands for, True or False.
    """
    return flatten(to_tree(config) | {"unit_output": config.scales_output})


def _upgraded(tree):
    """The same tree as this version writes it."""
    tree = {k: dict(v) if isinstance(v, dict) else v for k, v in tree.items()}
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        place = tree.get(section, {}) if section else tree
        if isinstance(place, dict) and name in place:
            place[new.rpartition(".")[2]] = place.pop(name)
    # Where nothing was said of it, the score was raw.
    tree.setdefault("unit_output", False)
    kinds = {row.config.__name__: name for name, row in MODELS.items()}
    model, sampling = tree.get("model"), tree.get("sampling")
    if isinstance(model, dict) and isinstance(model.get("kind"), str):
        model["kind"] = kinds.get(model["kind"], model["kind"])
    if isinstance(sampling, dict) and parsing.is_of(sampling.get("guidance"), int, float):
        # Version 0.1 knew only a weight.
        sampling["guidance"] = as_chain([sampling["guidance"]])
    return tree


def _from_dict(cls, tree, prefix=""):
    """A dataclass with the fields of an object of JSON; `prefix` is that of their full names."""
    hints = typing.get_type_hints(cls)
    parsing.refuse_unknown(tree, (field.name for field in dataclasses.fields(cls)), cls.__name__)
    return cls(**{k: _from_value(hints[k], v, prefix + k) for k, v in tree.items()})


def _from_value(hint, value, name):
    """A value of JSON as a field of this type has it."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise parsing.mismatch(name, value, "an object")
        return _from_dict(hint, value, f"{name}.")
    # Either one type, or one and None.
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if kind is Path:
        if isinstance(value, str) and "\0" not in value:
            return as_path(value)
        raise parsing.mismatch(name, value, "a path")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or len(value) > LONGEST:
            raise parsing.mismatch(name, value, f"a list of at most {LONGEST} entries")
        item = typing.get_args(kind)[0]
        return tuple(_from_value(item, part, f"{name}[{i}]") for i, part in enumerate(value))
    if typing.get_origin(kind) is dict:
        scalar = (str, int, float, bool, type(None))
        if not isinstance(value, dict) or not all(isinstance(v, scalar) for v in value.values()):
            raise parsing.mismatch(name, value, "an object of numbers and names")
        if any(isinstance(v, str) and len(v) > LONGEST_NAME for v in (*value, *value.values())):
            raise parsing.mismatch(name, value, "shorter names")
        return value
    if isinstance(value, str) and len(value) > LONGEST_NAME:
        raise parsing.mismatch(name, value, "a shorter name")
    if not parsing.is_of(value, *((int, float) if kind is float else (kind,))):
        raise parsing.mismatch(name, value, kind.__name__)
    return value
