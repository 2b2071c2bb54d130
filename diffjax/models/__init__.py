"""Flax Linen networks by name, and the functions that make one from its config.

The core takes any function `network(x_t, log_snr, cond)`; these networks come with it. Each network
is one file, with a frozen dataclass of its options and a Linen module, and one row of `MODELS`.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from ..types import Array, Cond, Key
from .dit import DiT, DiTConfig
from .edm2_unet import EDM2UNet, EDM2UNetConfig, Uncertainty, normalised
from .layers import OF_MAPS, UNTRAINED
from .mlp import MLP, MLPConfig
from .sizes import dit_config, edm2_config, jit_config
from .song_unet import SongUNet, SongUNetConfig
from .unet import UNet, UNetConfig


class ModelConfig(Protocol):
    """The interface of a network's config, a frozen dataclass, that runs use."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def blocks(self) -> int:
        """Residual blocks, of each level if there are several."""
        ...

    @property
    def dropout(self) -> float:
        """Probability of dropping an activation."""
        ...

    @property
    def out_channels(self) -> int | None:
        """Channels of the output; None for as many as x_t has."""
        ...

    @property
    def labels(self) -> int:
        """Number of classes of `cond["label"]`; 0 for no label.

        Concrete labels outside the table are refused (see `layers.class_index`).
        """
        ...

    @property
    def null_label(self) -> bool:
        """Whether the index `labels` means "no label"."""
        ...

    def check_input(self, shape: tuple[int, ...]) -> None:
        """Raise a ValueError unless the network takes examples of this shape."""
        ...


class Model(NamedTuple):
    """A row of `MODELS`.

    Attributes:
      config: the dataclass of a network's options.
      module: its module, `module(config)`.
      project: parameters -> the parameters that training keeps in their place, from the first ones
        on; None: training leaves them free.
    """

    config: type[Any]
    module: type[nn.Module]
    project: Callable[[Any], Any] | None = None


MODELS = {
    "unet": Model(UNetConfig, UNet),
    "song_unet": Model(SongUNetConfig, SongUNet),
    "mlp": Model(MLPConfig, MLP),
    "dit": Model(DiTConfig, DiT),
    "edm2_unet": Model(EDM2UNetConfig, EDM2UNet, normalised),
}
"""Networks by name, as configs and the command line choose them."""

__all__ = [
    "MODELS",
    "OF_MAPS",
    "UNTRAINED",
    "DiTConfig",
    "EDM2UNetConfig",
    "MLPConfig",
    "Model",
    "ModelConfig",
    "SongUNetConfig",
    "UNetConfig",
    "Uncertainty",
    "apply",
    "cast_ahead",
    "dit_config",
    "edm2_config",
    "jit_config",
    "make_module",
    "name_of",
    "start_from",
    "switched",
    "takes",
]


def name_of(config: ModelConfig) -> str:
    """The name in `MODELS` of a config's network."""
    return next(name for name, row in MODELS.items() if type(config) is row.config)


def make_module(config: ModelConfig) -> nn.Module:
    """Make the Linen module of a config.

    >>> type(make_module(MLPConfig())).__name__
    'MLP'
    """
    return MODELS[name_of(config)].module(config)


def takes(config: ModelConfig, option: str) -> int:
    """The value of an option that not every network has, such as `two_times`; False without it.

    >>> takes(MLPConfig(embedding="angle", two_times=True), "two_times")
    True
    """
    return getattr(config, option, False)


def switched(config: ModelConfig, name: str) -> ModelConfig:
    """Change the network of a config.

    An option that both networks have keeps the value that the config has set, if the new network
    accepts it. The exception is `log_snr_scale`, whose right value depends on how a network embeds
    log-SNR.

    Raises:
      ValueError: if there is no such network.

    >>> new = switched(UNetConfig(width=64, labels=10), "song_unet")
    >>> new.width, new.labels, new.mults == SongUNetConfig().mults
    (64, 10, True)
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: one of {', '.join(MODELS)}")
    if type(config) is MODELS[name].config:
        return config
    new, defaults = MODELS[name].config(), vars(type(config)())
    for option, value in vars(config).items():
        if option in vars(new) and value != defaults[option] and option != "log_snr_scale":
            with contextlib.suppress(ValueError):
                new = dataclasses.replace(new, **{option: value})
    return new


def apply(
    module: nn.Module,
    params: Any,
    x_t: Array,
    log_snr: Array,
    cond: Cond = None,
    *,
    dropout: Key | None = None,
) -> Array:
    """Apply a Linen module; with `dropout` keys `[batch]`, in training mode.

    `functools.partial(apply, module, params)` is a network as the core takes it. Dropout masks are
    drawn under `vmap`, each example's from its own key, so that they do not depend on how the batch
    is split over devices.

    Raises:
      ValueError: if `cond` has the end of a flow map's step, and the module is one of `MODELS` that
        does not take it.
    """
    if isinstance(cond, dict) and "log_snr_s" in cond:
        _check_two_times(module)
    if dropout is None:
        return jnp.asarray(module.apply({"params": params}, x_t, log_snr, cond))

    def one(x_t, log_snr, cond, key):
        x_t, log_snr, cond = jax.tree.map(lambda a: a[None], (x_t, log_snr, cond))
        return module.apply({"params": params}, x_t, log_snr, cond, rngs={"dropout": key})[0]

    return jax.vmap(one)(x_t, log_snr, cond, dropout)


def _check_two_times(module: Any) -> None:
    """Raise a ValueError for a network of `MODELS` of one time; others may read what they like."""
    ours = tuple(row.module for row in MODELS.values())
    if isinstance(module, ours) and not takes(module.config, "two_times"):
        raise ValueError(
            f"{name_of(module.config)} is given two times, and its config takes one: set "
            "two_times=True, as the network of a flow map needs"
        )


def start_from(fresh: Any, trained: Any) -> Any:
    """The parameters of a trained network, and those of `OF_MAPS` of a fresh one if it has none.

    Those start at zero, so that a flow map that starts from a denoiser is that denoiser for every
    end of its step.

    Args:
      fresh: parameters of the network that starts.
      trained: parameters of the network that it starts from.

    Raises:
      ValueError: if other parameters are missing or too many, or of another shape; names all.
    """
    flat = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree))
    new, old = flat(fresh), flat(trained)
    added = {path for path in new if any(getattr(k, "key", None) in OF_MAPS for k in path)}
    wrong = []
    for path in (new.keys() | old.keys()) - (added - old.keys()):
        shapes = [jnp.shape(tree[path]) if path in tree else None for tree in (new, old)]
        if shapes[0] != shapes[1]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            wrong.append(f"{name} of shape {shapes[1]}, but the network has {shapes[0]}")
    if wrong:
        raise ValueError(
            "the network must have the model of the run that it starts from, beside two_times and "
            "guidance_weight; parameters\n  " + "\n  ".join(sorted(wrong))
        )
    return jax.tree_util.tree_map_with_path(lambda path, p: old.get(path, p), fresh)


def cast_ahead(network: Callable, params: Any, *inputs: Any) -> Any:
    """The parameters, those that a network only ever casts to one type in that type.

    What the network returns is the same bit for bit. A network that computes in bfloat16 casts its
    parameters at each call, and XLA does not move that out of the loop of a walk. Parameters that
    it uses as they are, such as those of a normalisation, stay as they are.

    >>> network = lambda params, x: params["kernel"].astype(jnp.bfloat16) * x + params["bias"]
    >>> params = {"kernel": jnp.ones(3), "bias": jnp.ones(3)}
    >>> jax.tree.map(lambda x: x.dtype.name, cast_ahead(network, params, jnp.ones(3)))
    {'bias': 'float32', 'kernel': 'bfloat16'}
    """
    leaves, tree = jax.tree.flatten(params)
    types = _types_of_uses(jax.make_jaxpr(network)(params, *inputs).jaxpr)[: len(leaves)]
    cast = lambda x, types: x.astype(*types) if len(types) == 1 else x
    return tree.unflatten(map(cast, leaves, types))


def _types_of_uses(jaxpr):
    """Of each input of a program, the types that it is cast to, or its own where it is not cast."""
    types: dict[int, set[Any]] = {id(v): set() for v in jaxpr.invars}

    def use(v, as_types):
        types.get(id(v), set()).update(as_types)

    for equation in jaxpr.eqns:
        inside = list(jaxprs_in_params(equation.params))
        if equation.primitive.name == "convert_element_type":
            use(equation.invars[0], [equation.params["new_dtype"]])
        elif len(inside) == 1 and len(inside[0].invars) == len(equation.invars):
            for v, as_types in zip(equation.invars, _types_of_uses(inside[0]), strict=True):
                use(v, as_types)
        else:
            for v in equation.invars:
                use(v, [v.aval.dtype])
    for v in jaxpr.outvars:
        use(v, [v.aval.dtype])
    return [types[id(v)] for v in jaxpr.invars]
