"""ImageNet at 256 x 256 in pixels as JiT-B/16 (Li & He 2025).

    python train.py --config=configs/jit_imagenet256.py --config.data.path=imagenet

The folder holds `train` and `val`.

Theirs: 131 million parameters, 600 epochs in batches of 1024, AdamW with betas 0.9 and 0.95 at a
constant 2e-4 after 5 epochs of warm-up; FID 3.66 with 50 steps of Heun's method and guidance of
weight 2.9 where the share of the data is at least 0.1. `:L` is JiT-L/16, whose guidance has the
weight 2.4.

Not run here: it needs a pod and the images; the network's parameter count, the weight of the loss
and the number of images are tested.
"""

import dataclasses

from diffjax.experiment import Config, Data, Optimizer, Sampling, smoke, variant_of
from diffjax.models import jit_config

IMAGES = 1_281_167
"""Training images of ImageNet."""


def make(size: str, weight: float) -> Config:
    batch = 1024
    # A share of 0.1 is a log-SNR of 2 ln(0.1 / 0.9).
    guidance = (f"classifier_free:weight={weight}", "within:low=-4.394,high=15")
    epochs = lambda n: n * IMAGES // batch
    return Config(
        data=Data("folder", size=256, channels=3, flip=True, crop="adm"),
        target="x_0",
        schedule="rectified_flow",
        weighting="velocity",
        weighting_options={"least": 0.05},
        density="normal",
        density_options={"mean": -1.6, "std": 1.6},  # logit of the data's share: -0.8, 0.8
        density_weights=False,
        label_drop=0.1,
        model=jit_config(size, 16, labels=1000, null_label=True),
        optimizer=Optimizer(learning_rate=2e-4, warmup=epochs(5), clip=None, beta_2=0.95),
        ema=0.9999,
        ema_warmup=False,
        batch_size=batch,
        steps=epochs(600),
        log_every=100,
        eval_every=5000,
        save_every=5000,
        keep_every=50_000,
        sample_every=25_000,
        parallel="sharded",
        sampling=Sampling("heun", times="uniform", steps=50, guidance=guidance),
    )


def get_config(variant: str = "") -> Config:
    config = make("B", 2.9)
    small = dict(width=16, blocks=2, heads=2, patch=4, bottleneck=8)
    model = dataclasses.replace(
        config.model, **small, class_tokens=2, class_tokens_from=1, labels=10
    )
    data = dataclasses.replace(config.data, size=8)
    return variant_of(
        config,
        variant,
        smoke=lambda: smoke(config, model=model, data=data),
        L=lambda: make("L", 2.4),
    )
