"""ImageNet at 64 x 64 as EDM2-S (Karras et al. 2024, configuration G).

    python train.py --config=configs/edm2_imagenet64.py --config.data.path=imagenet

The folder holds `train` and `val`.

Theirs: 280 million parameters, 2^30 images in batches of 2048, FID 1.58 with 63 evaluations and the
average of the best width, which is found after training (docs/howto/averages.md). They compute in
float16, which is bfloat16 here. `:M`, `:L` and `:XL` are the other sizes, with FID 1.43, 1.33 and
1.33.

Not run here: it needs a pod and the images; the network's parameter count, the density, the weight
of the loss and the number of images are tested.
"""

import dataclasses
import functools

from diffjax.experiment import Config, Data, Optimizer, Sampling, smoke, variant_of
from diffjax.models import edm2_config

SIZES = {
    # training images in units of 2^20, learning rate, dropout
    "S": (1024, 0.0100, 0.0),
    "M": (2048, 0.0090, 0.1),
    "L": (1024, 0.0080, 0.1),
    "XL": (640, 0.0070, 0.1),
}


def make(size: str) -> Config:
    mebi, rate, dropout = SIZES[size]
    batch = 2048
    return Config(
        data=Data("folder", size=64, channels=3, crop="area"),
        target="F",
        unit_input=True,
        schedule="log_uniform",
        schedule_options={"sigma_min": 0.002, "sigma_max": 80.0},
        weighting="preconditioned",
        density="normal",
        density_options={"mean": 1.6, "std": 3.2},  # ln sigma of mean -0.8, deviation 1.6
        density_weights=False,
        learned_uncertainty=True,
        model=edm2_config(size, labels=1000, dropout=dropout, bfloat16=True),
        optimizer=Optimizer(
            learning_rate=rate,
            warmup=10_000_000 // batch,
            inverse_sqrt_from=35_000,
            clip=None,
            beta_2=0.99,
        ),
        averages=(0.05, 0.1),
        snapshot_every=4096,
        snapshot_dtype="float16",
        batch_size=batch,
        steps=mebi * 2**20 // batch,
        log_every=128,
        eval_every=4096,
        save_every=4096,
        sample_every=4096,
        parallel="sharded",
        sampling=Sampling("edm", times="karras", steps=32),
    )


def get_config(variant: str = "") -> Config:
    config = make("S")
    model = dataclasses.replace(
        config.model, width=16, mults=(1,), blocks=1, attention=(), head_width=16, labels=10
    )
    data = dataclasses.replace(config.data, size=8)
    others = {size: functools.partial(make, size) for size in SIZES}
    return variant_of(
        config, variant, smoke=lambda: smoke(config, model=model, data=data), **others
    )
