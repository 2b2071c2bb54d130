"""CIFAR-10 as in "Variational Diffusion Models" (Kingma et al. 2021), without augmentation.

    python train.py --config=configs/vdm_cifar10.py --config.data.path=cifar-10-batches-bin

Theirs: 32 blocks of 128 channels at one resolution, Fourier features, a schedule of 1024 sigmoids
that is learned with its ends, 10 million steps of 128 images, 2.65 bits per dimension. Not run
here: no package carries the images, and this needs accelerators. The tests count the network's
parameters, 30,577,667: theirs without the weights of a conditioning that is always zero here, and
without the two numbers of the schedule of their published config.
"""

import dataclasses

from diffjax.experiment import Config, Data, Optimizer, Sampling, smoke, variant_of
from diffjax.models import UNetConfig

LOG_SNR_MIN, LOG_SNR_MAX = -5.0, 13.3


def get_config(variant: str = "") -> Config:
    scale = 1000 / (LOG_SNR_MAX - LOG_SNR_MIN)  # the network is given 0 to 1000 between the ends
    model = UNetConfig(
        width=128,
        mults=(1,),
        blocks=32,
        attention=(),
        groups=32,
        dropout=0.1,
        log_snr_scale=-scale,
        log_snr_shift=scale * LOG_SNR_MAX,
        embedding_period=10000 ** (64 / 63),  # 64 frequencies, of which the last is 1 / 10000
        noise_from_zero=True,
        residual=True,
        out_channels=3,
    )
    config = Config(
        data=Data("cifar10"),
        target="eps",
        schedule="monotone",
        schedule_options={
            "width": 1024,
            "log_snr_min": LOG_SNR_MIN,
            "log_snr_max": LOG_SNR_MAX,
        },
        weighting="elbo",
        fourier_features=(7, 8),
        model=model,
        optimizer=Optimizer(
            learning_rate=2e-4, warmup=100, clip=None, beta_2=0.99, weight_decay=0.01
        ),
        ema=0.9999,
        ema_warmup=False,
        batch_size=128,
        steps=10_000_000,
        log_every=1000,
        eval_every=10_000,
        save_every=10_000,
        keep_every=1_000_000,
        sample_every=100_000,
        sampling=Sampling("ancestral", steps=1000, columns=10),
    )
    tiny = dataclasses.replace(model, width=8, blocks=1, groups=4)
    return variant_of(config, variant, smoke=lambda: smoke(config, model=tiny))
