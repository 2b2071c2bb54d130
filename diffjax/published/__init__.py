"""Networks that others have trained and published, from their own files into ours.

    from diffjax import published
    params, config = published.load("ddpm-cifar10-32")           # a folder of diffusers
    params, config = published.load("64x64_diffusion.pt")        # improved- or guided-diffusion
    params, config = published.load("edm-imagenet-64x64-cond-adm.pkl")        # EDM

`python -m diffjax.export SOURCE FILE` writes such a network to a file of ours. The config says what
the network predicts, on which schedule, and how it is given the log-SNR, so that our samplers can
use it. No file is ever executed: see `torchfile`. Our own networks as files are in `weights`, and
those that come with diffjax in `pretrained`; `trained` loads any network of ours.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..experiment import Config
from . import diffusers, edm, openai
from .pretrained import PRETRAINED as PRETRAINED

READERS: dict[str, Callable[[Path], tuple[Any, Config]]] = {
    "": diffusers.load,
    ".pt": openai.load,
    ".pkl": edm.load,
}
"""The reader by the path's suffix; a folder has the suffix ""."""


def load(path: Path | str) -> tuple[Any, Config]:
    """The parameters and the config of a published network.

    Args:
      path: a folder with diffusers' `config.json`, a state dict of OpenAI's under the name that
        they gave it, or a pickle of EDM's.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is damaged, or not a network that ours can be; says why.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    kind = "" if path.is_dir() else path.suffix
    if kind not in READERS:
        raise ValueError(f"{path}: can read a folder of diffusers, a .pt of OpenAI, a .pkl of EDM")
    try:
        return READERS[kind](path)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is not the network it is taken for: {error!r}") from error
