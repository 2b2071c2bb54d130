"""What the network of a run is conditioned on, and what guidance compares with.

A run may train without its label, or with a small image that is all noise, for a part of the
examples. Guidance then amplifies the effect of the label, of the image, or of both at once.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import keys, models
from ..guidance import GUIDANCES, STEP_GUIDANCES
from ..schedules import Schedule
from ..super_resolution import shrink, small_image
from ..types import Cond
from .config import Config, learned_weight, parse_guidance, require

WITHOUT = {"label": {"label"}, "image": {"image"}, "both": {"label", "image"}}
"""What guidance may compare with the network's output without, as its option `without`."""


def arguments(name: str) -> list[str]:
    """The names of a guidance's arguments; none if there is no such guidance."""
    table = GUIDANCES | STEP_GUIDANCES
    return list(inspect.signature(table[name]).parameters) if name in table else []


def needs_null(name: str) -> bool:
    """Whether a guidance compares with the network's output without its conditioning.

    >>> needs_null("apg"), needs_null("within")
    (True, False)
    """
    return "null" in arguments(name)


def dropped(config: Config) -> dict[str, float]:
    """What a run trains without for a part of the examples, and the probability of each."""
    label = config.label_drop if config.model.null_label else 0.0
    each = {"label": label, "image": config.low_resolution_drop}
    return {name: probability for name, probability in each.items() if probability > 0}


def take_without(
    config: Config, name: str, options: dict[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """The options of a guidance without the one that says what it compares without, and that.

    >>> take_without(Config(), "classifier_free", {"weight": 2, "without": "label"})
    ({'weight': 2}, {'label'})
    """
    if not needs_null(name):
        return options, set()
    rest = {option: value for option, value in options.items() if option != "without"}
    said = options.get("without")
    return rest, set(dropped(config)) if said is None else WITHOUT.get(str(said), set())


def check_null(config: Config) -> None:
    """Refuse guidance that compares with what the run is not trained without.

    The label and the image are dropped by one random number, so that the rarer is never dropped
    without the other.

    Raises:
      ValueError: naming the guidance, and what to change.
    """
    found = dropped(config)
    for word in config.sampling.guidance:
        name, options = parse_guidance(word)
        _, names = take_without(config, name, options)
        said, without = f"sampling.guidance={word}", options.get("without", "both")
        others = found.keys() - names
        lacks, rarer = (
            sorted(names - found.keys()),
            min((found[n] for n in names & found.keys()), default=0),
        )
        needs = "model.null_label=True and label_drop above 0"
        if config.low_resolution is not None:
            needs += ", or low_resolution_drop above 0, so that it is trained without the image too"
        require(
            (not needs_null(name) or bool(found), f"{said}: needs {needs}"),
            (
                not needs_null(name) or without in WITHOUT,
                f"{said}: unknown without {without!r}: one of {', '.join(WITHOUT)}",
            ),
            (not lacks, f"{said}: the run is never trained without its {' and '.join(lacks)}"),
            (
                not names or all(rarer > found[other] for other in others),
                f"{said}: with label_drop={config.label_drop} and low_resolution_drop="
                f"{config.low_resolution_drop} the {' '.join(names)} is dropped only together with "
                f"the {' '.join(others)}; drop it more often",
            ),
        )


def make_null(config: Config, schedule: Schedule, names: set[str]) -> Callable[[Cond], Cond]:
    """What the network is conditioned on -> the same without what `names` has.

    An image that is left out is all noise, as in training: the same noise for every example.
    """

    def null(cond):
        cond = cond or {}
        gone = {"label": np.int32(config.model.labels)} if "label" in names else {}
        if "image" in names and "image" in cond:
            nothing = jnp.zeros_like(cond["image"][:1])
            gone |= small_image(jax.random.key(0), schedule, nothing, 1.0)
        return {**cond, **gone}

    return null


def make_condition(config: Config, schedule: Schedule) -> Callable[..., Cond]:
    """`Experiment.condition`.

    The `label` of the batch, if the model has labels, and with `drop` sometimes the null label. For
    super-resolution the batch's `small` images, or the means of its `x`, which may be windows,
    diffused to the time `cond_noise`, or, if None, to a random one, and with `drop` sometimes to 1.
    The numbers `told` of an augmentation, zero where nothing was done. The weight of guidance, if a
    flow map learns it: with `drop` a random one, else that of sampling.
    """
    labels, low = config.model.labels, config.low_resolution
    whole = config.data.image_size
    augment_dim = models.takes(config.model, "augment_dim")

    def condition(key, batch, drop=False, cond_noise=None, told=None):
        key_drop, key_time, key_noise, key_weight = (keys.fold_in(key, use) for use in range(4))
        chance = jax.vmap(jax.random.uniform)(key_drop)  # of the label and the image to be dropped
        cond = {}
        if labels:
            cond["label"] = batch["label"]
        if drop and config.model.null_label:
            cond["label"] = jnp.where(chance < config.label_drop, labels, batch["label"])
        if augment_dim:
            cond["augment"] = jnp.zeros((len(key), augment_dim)) if told is None else told
        if low is not None:
            if "small" in batch:
                small = batch["small"]
            else:  # of a window, in proportion
                x = batch["x"]
                small = shrink(x, low if whole is None else low * x.shape[1] // whole[0])
            t = cond_noise
            if t is None:
                t = config.max_cond_noise * jax.vmap(jax.random.uniform)(key_time)
            if drop and config.low_resolution_drop:
                t = jnp.where(chance < config.low_resolution_drop, 1.0, t)
            cond |= small_image(key_noise, schedule, small, t)
        most = config.flow_map.guidance_to
        if most is not None:
            uniform = jax.vmap(jax.random.uniform)(key_weight)
            chosen = learned_weight(config.sampling.guidance)
            cond["guidance"] = 1 + (most - 1) * uniform if drop else 0 * uniform + chosen
        return cond or None

    return condition
