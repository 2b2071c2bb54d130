"""Two moons: points in the plane and a multilayer perceptron. Not measured.

    python train.py --config=configs/two_moons.py

Any of diffjax's toy sets will do: --config.data.name=checkerboard, for example. The variant `map`
learns a flow map, which draws them in one step:

    python train.py --config=configs/two_moons.py:map
"""

import dataclasses

from diffjax.experiment import Config, Data, Optimizer, Sampling, smoke, variant_of
from diffjax.models import MLPConfig


def get_config(variant: str = "") -> Config:
    config = Config(
        data=Data("two_moons"),
        model=MLPConfig(width=128, blocks=3),
        optimizer=Optimizer(learning_rate=1e-3),
        # Points have no clip_x_0 to rescue a small alpha: shorter ends.
        schedule_options={"log_snr_min": -10.0, "log_snr_max": 10.0},
        batch_size=512,
        steps=4000,
        log_every=200,
        eval_every=1000,
        save_every=2000,
        sample_every=2000,
        sampling=Sampling(steps=100, columns=64),
    )
    in_one_step = dataclasses.replace(
        config,
        objective="flow_map",
        target="v",
        model=dataclasses.replace(config.model, embedding="angle", two_times=True),
        sampling=Sampling(sampler="jump", steps=1, columns=64),
    )
    tiny = dataclasses.replace(config.model, width=16, blocks=1)
    return variant_of(
        config, variant, smoke=lambda: smoke(config, model=tiny), map=lambda: in_one_step
    )
