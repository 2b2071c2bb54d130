"""Latents of ImageNet at 256 x 256 as DiT-XL/2 (Peebles & Xie 2023, section 4).

    python train.py --config=configs/dit_imagenet256.py \\
        --config.data.path=records/latents --config.data.autoencoder=sd-vae-ft-mse

The data are the latents of Stable Diffusion's autoencoder (docs/howto/latents.md makes them), of
the images and of their mirror images. Theirs: 675 million parameters, 7 million steps of 256
images, AdamW at a constant 1e-4 without decay or warm-up; FID 2.27 with 250 steps of the ancestral
sampler and guidance of weight 1.5 on the first three channels. It mirrors images at random before
they are encoded.

Not run here: it needs a pod and the images; the network's parameter count is tested, and that it
is the network of the published file.
"""

import dataclasses
import math

from diffjax.experiment import Config, Data, Optimizer, Sampling, smoke, variant_of
from diffjax.models import dit_config


def get_config(variant: str = "") -> Config:
    options = dict(labels=1000, null_label=True, out_channels=8, log_snr_scale=1.0)
    model = dit_config("XL", 2, **options, remat="dots")  # docs/accelerators.md has what it saves
    config = Config(
        data=Data("records", latents="sd"),
        target="eps",
        schedule="linear_betas",
        schedule_options={"steps": 1000},
        time_steps=1000,
        time_input=True,
        bound_weight=0.001 / math.log(2),  # theirs is of a bound in bits
        weighting="constant",
        label_drop=0.1,
        model=model,
        optimizer=Optimizer(learning_rate=1e-4, warmup=0, clip=None),
        ema=0.9999,
        ema_warmup=False,
        batch_size=256,
        steps=7_000_000,
        log_every=100,
        eval_every=10_000,
        save_every=10_000,
        keep_every=500_000,
        sample_every=50_000,
        parallel="sharded",
        sampling=Sampling(
            "ancestral",
            {"variance": "learned"},
            steps=250,
            guidance=("classifier_free:weight=1.5,channels=3",),
        ),
    )
    tiny = dataclasses.replace(model, width=16, blocks=1, heads=2, labels=10)
    return variant_of(config, variant, smoke=lambda: smoke(config, model=tiny))
