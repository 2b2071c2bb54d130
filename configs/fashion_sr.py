"""Super-resolution of Fashion-MNIST, 14x14 -> 28x28 (Ho et al. 2022, "Cascaded diffusion models").

python train.py --config=configs/fashion_sr.py --workdir=runs/fashion_sr
"""

import dataclasses

from diffjax.config import Config, Data, Optimizer, Sampling, UNetConfig, smoke, variant_of


def get_config(variant: str = "") -> Config:
    model = UNetConfig(
        width=32,
        mults=(1, 2),
        patch=2,
        blocks=1,
        attention=(),
        groups=8,
        dropout=0.0,
        image_cond=True,
    )
    config = Config(
        data=Data("fashion_mnist"),
        low=14,
        augment=0.5,
        model=model,
        optimizer=Optimizer(learning_rate=2e-3, warmup=100),
        schedule_options={"log_snr_min": -10.0, "log_snr_max": 10.0},
        weighting="min_snr",
        ema=0.995,
        batch_size=64,
        steps=1500,
        log_every=50,
        eval_every=500,
        save_every=500,
        sample_every=1500,
        sampling=Sampling(steps=30, level=0.1, columns=20, score=1000),
    )
    tiny = dataclasses.replace(model, width=8, mults=(1,), groups=4)
    return variant_of(config, variant, smoke=lambda: smoke(config, model=tiny))
