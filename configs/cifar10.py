"""CIFAR-10 as in DDPM (Ho et al. 2020, section 4 and appendix B).

    python train.py --config=configs/cifar10.py --config.data.path=cifar-10-batches-bin

Theirs: 35.7 million parameters, T = 1000, 800,000 steps of 128 images on a TPU v3-8 in 10.6 hours,
FID 3.17. Not run here: no package carries the images, and this needs an accelerator; the network's
parameter count, the schedule and the step are tested against the paper.
"""

import dataclasses

from diffjax.experiment import Config, Data, Optimizer, Sampling, smoke, variant_of
from diffjax.models import UNetConfig


def get_config(variant: str = "") -> Config:
    model = UNetConfig(
        width=128, mults=(1, 2, 2, 2), blocks=2, attention=(16,), groups=32, dropout=0.1
    )
    config = Config(
        data=Data("cifar10", flip=True),
        target="eps",
        schedule="linear_betas",
        time_steps=1000,
        model=model,
        optimizer=Optimizer(learning_rate=2e-4, warmup=5000),
        ema=0.9999,
        batch_size=128,
        steps=800_000,
        log_every=100,
        eval_every=5000,
        save_every=5000,
        keep_every=100_000,
        sample_every=5000,
        sampling=Sampling(
            sampler="ancestral", options={"variance": "beta"}, steps=1000, columns=10
        ),
    )
    tiny = dataclasses.replace(model, width=8, mults=(1,), blocks=1, groups=4, attention=())
    return variant_of(config, variant, smoke=lambda: smoke(config, model=tiny))
