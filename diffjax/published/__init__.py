"""Readers of networks that others have trained and published.

    from diffjax import published
    params, config = published.load("ddpm-cifar10-32")           # a folder of diffusers
    params, config = published.load("64x64_diffusion.pt")        # improved- or guided-diffusion
    params, config = published.load("edm-imagenet-64x64-cond-adm.pkl")        # EDM; EDM2 likewise
    params, config = published.load("DiT-XL-2-256x256.pt")       # DiT; SiT likewise
    params, config = published.load("jit-b-16/checkpoint-last.pth")           # JiT

`python -m diffjax.export SOURCE FILE` writes such a network to a file in diffjax's format, which
`weights` defines. The config holds the network's target, its schedule, and how it is given the
log-SNR, so that diffjax's samplers can use it. No code in a file is executed: see `torchfile`.
`pretrained` holds the networks that come with diffjax, and `trained` loads any network of diffjax.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..experiment import Config
from ..training.store import as_path
from . import diffusers, dit, edm, openai
from .pretrained import PRETRAINED as PRETRAINED


def _state_dict(path):
    """Read a state dict, whose name says whose network it is."""
    return (dit if path.stem.startswith(("DiT-", "SiT-")) else openai).load(path)


FORMATS: dict[str, Callable[[Path], tuple[Any, Config]]] = {
    "": diffusers.load,
    ".pt": _state_dict,
    ".pth": dit.load,
    ".pkl": edm.load,
}
"""Readers by suffix of the path; a folder has the suffix ""."""


def load(path: Path | str) -> tuple[Any, Config]:
    """Read the parameters and the config of a published network.

    Args:
      path: a folder with diffusers' `config.json`; a state dict of OpenAI, DiT or SiT with its
        original file name; a checkpoint of JiT; or a pickle of EDM or EDM2.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: if the file is damaged, or diffjax has no such network; the message says why.
    """
    path = as_path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    kind = "" if path.is_dir() else path.suffix
    if kind not in FORMATS:
        raise ValueError(
            f"{path}: can read a folder of diffusers, a .pt of OpenAI, DiT or SiT, a .pth of JiT, "
            "a .pkl of EDM or EDM2"
        )
    try:
        return FORMATS[kind](path)
    except OSError:
        raise
    except Exception as error:  # untrusted input may raise anything
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        why = f"{error!r}"[:600]
        raise ValueError(f"{path} is not the network it is taken for: {why}") from error
