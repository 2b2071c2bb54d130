"""The published sizes of networks, as functions that make their configs."""

from collections.abc import Mapping
from typing import Any

from .dit import DiTConfig
from .edm2_unet import EDM2UNetConfig

DIT = {
    "S": dict(width=384, blocks=12, heads=6),
    "B": dict(width=768, blocks=12, heads=12),
    "L": dict(width=1024, blocks=24, heads=16),
    "XL": dict(width=1152, blocks=28, heads=16),
}
"""The sizes of DiT (Peebles & Xie 2023, table 1) and SiT."""
JIT: dict[str, dict[str, int]] = {
    "B": DIT["B"] | dict(bottleneck=128, class_tokens_from=4),
    "L": DIT["L"] | dict(bottleneck=128, class_tokens_from=8),
    "H": dict(width=1280, blocks=32, heads=16, bottleneck=256, class_tokens_from=10),
}
"""The sizes of JiT (Li & He 2025)."""
EDM2: dict[str, dict[str, Any]] = {
    "XS": dict(width=128),
    "S": dict(width=192),
    "M": dict(width=256, dropout=0.1),
    "L": dict(width=320, dropout=0.1),
    "XL": dict(width=384, dropout=0.1),
    "XXL": dict(width=448, dropout=0.1),
}
"""The sizes of EDM2 (Karras et al. 2024), with the dropout that it trains them with on latents of
ImageNet-512."""


def dit_config(size: str, patch: int = 2, **options: Any) -> DiTConfig:
    """The options of a DiT or SiT of the paper, such as DiT-XL/2.

    Raises:
      ValueError: if `DIT` has no such size.

    >>> dit_config("XL", 2, labels=1000, null_label=True).blocks
    28
    """
    return DiTConfig(**{**_sizes(DIT, size), "patch": patch, **options})


def jit_config(size: str, patch: int = 16, **options: Any) -> DiTConfig:
    """The options of a JiT of the paper, such as JiT-B/16, which predicts x_0 from pixels.

    Raises:
      ValueError: if `JIT` has no such size.

    >>> jit_config("L", 16, labels=1000, null_label=True).class_tokens_from
    8
    """
    modern = dict(rms_norm=True, qk_norm=True, rope=True, swiglu=True, flow_time=True)
    own = {**_sizes(JIT, size), **modern, "class_tokens": 32, "patch": patch}
    return DiTConfig(**{**own, **options})


def edm2_config(size: str, **options: Any) -> EDM2UNetConfig:
    """The options of a network of the paper, such as EDM2-XS.

    Raises:
      ValueError: if `EDM2` has no such size.

    >>> edm2_config("XXL", labels=1000).width
    448
    """
    return EDM2UNetConfig(**{**_sizes(EDM2, size), **options})


def _sizes(table: Mapping[str, Mapping[str, Any]], size: str) -> Mapping[str, Any]:
    if size not in table:
        raise ValueError(f"size={size!r}: one of {', '.join(table)}")
    return table[size]
