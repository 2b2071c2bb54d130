"""CIFAR-10 with labels as in EDM (Karras et al. 2022, table 1, and the training of appendix F).

    python train.py --config=configs/edm_cifar10.py --config.data.path=cifar-10-batches-bin

Theirs: DDPM++ of 55.7 million parameters, 200 million images in batches of 512, an average of half
life 0.5 million images, augmentation with probability 0.12; FID 1.79 with 35 evaluations. One thing
differs here: at the start their average has another warm-up.

Not run here: no package carries the images, and this needs an accelerator; the network's parameter
count, the weight of the loss and the numbers of images are tested.
"""

import dataclasses

from diffjax.experiment import Config, Data, Optimizer, Sampling, smoke, variant_of
from diffjax.models import SongUNetConfig


def get_config(variant: str = "") -> Config:
    model = SongUNetConfig(
        width=128,
        mults=(2, 2, 2),
        blocks=4,
        attention=(16,),
        dropout=0.13,
        labels=10,
        augment_dim=9,
    )
    batch = 512
    config = Config(
        data=Data("cifar10"),
        target="F",
        unit_input=True,
        schedule="log_uniform",
        schedule_options={"sigma_min": 0.002, "sigma_max": 80.0},
        weighting="preconditioned",
        density="normal",
        density_options={"mean": 2.4, "std": 2.4},  # ln sigma of mean -1.2, deviation 1.2
        density_weights=False,
        augmentation="edm",
        augmentation_options={"p": 0.12},
        model=model,
        optimizer=Optimizer(learning_rate=1e-3, warmup=10_000_000 // batch, clip=None),
        ema=0.5 ** (batch / 500_000),
        batch_size=batch,
        steps=200_000_000 // batch,
        log_every=100,
        eval_every=5000,
        save_every=5000,
        keep_every=50_000,
        sample_every=5000,
        sampling=Sampling("edm", times="karras", steps=18),
    )
    small = dataclasses.replace(config.data, size=8)
    tiny = dataclasses.replace(model, width=32, mults=(1,), blocks=1, attention=())
    return variant_of(config, variant, smoke=lambda: smoke(config, model=tiny, data=small))
