"""The networks and batches that `speed.py` times, as plain numbers that both sides can read."""

from typing import NamedTuple


class Workload(NamedTuple):
    """A U-Net on images of `size` x `size` x `channels`, and the size of a batch.

    The other fields are those of `diffjax.models.UNetConfig`. For images that a network would fold
    into patches, `size` and `channels` are those after folding.
    """

    size: int
    channels: int
    width: int
    mults: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    groups: int
    batch: int
    labels: int = 0
    head_width: int | None = None
    scale_shift: bool = False
    resblock_updown: bool = False
    dropout: float = 0.0


DDPM = Workload(32, 3, 128, (1, 2, 2, 2), 2, (16,), 32, 128, dropout=0.1)
ADM = Workload(
    *(64, 3, 192, (1, 2, 3, 4), 3, (32, 16, 8), 32, 64),
    labels=1000,
    head_width=64,
    scale_shift=True,
    resblock_updown=True,
    dropout=0.1,
)
WORKLOADS = {
    "digits": Workload(8, 1, 32, (1, 1), 1, (4,), 8, 128, labels=10),
    "fashion": Workload(14, 4, 48, (1, 2), 1, (7,), 8, 128),
    "32x32": Workload(32, 1, 32, (1, 2, 4), 2, (8,), 8, 64),
    "ddpm-128": DDPM,
    "ddpm-512": DDPM._replace(batch=512),
    "ddpm-1024": DDPM._replace(batch=1024),
    "adm-64": ADM,
}
CPU = ("digits", "fashion", "32x32")
GPU = ("ddpm-128", "ddpm-512", "ddpm-1024", "adm-64")
DDIM_STEPS, IMAGES = 50, 64
LEARNING_RATE, EMA, CLIP = 2e-4, 0.9999, 1.0
