"""Small networks that come with diffjax: `load("digits")`, `"fashion_mnist"` and `"fashion_map"`.

    from diffjax.checkpoint import load
    apply, params, config = load("digits")

This project trained them, and they are under its licence, Apache-2.0. Each file holds its config,
so that the training can be repeated. The first two were trained on 2026-11-23, on two cores of an
AMD EPYC with AVX512_BF16:

    digits          python train.py                                         1.2 MB, 143 s
    fashion_mnist   python train.py --config=configs/fashion_mnist.py       2.8 MB, 388 s

`fashion_map` is a flow map, 2.8 MB, that draws an image by one evaluation of its network, or by a
few, `--steps=4`. It was distilled on 2026-11-28 from a denoiser that is guided with weight 2.5 at
log-SNR from -2 to 4, as "lagrangian, distilled" of `studies/flow_maps.py`, seed 0;
docs/howto/few_steps.md has its distances.

The results of the first two, by `evaluate.py` (with `--n=800` for the digits) and by
`evaluation.distances.from_halves`, with the results of real data in parentheses:

                                             digits              fashion_mnist
    bits per dimension, held out             2.069 +- 0.017      4.436 +- 0.025
    Frechet distance, 24 components          0.226 (0.190)       14.5 (0.84)
    accuracy, by nearest neighbour           97.0 % (98.8 %)     63.0 % (80.3 %)

The distance and the accuracy are of 800 samples and the whole data set (digits), and of 1,000
samples and 10,000 random images (Fashion-MNIST). The networks are for notebooks and first steps.
The second was trained for 1,700 steps only, and its sandals and prints are often malformed. Data:
UCI optdigits (CC BY 4.0, `diffjax/data/digits.LICENSE`); Fashion-MNIST (Xiao et al., MIT).
"""

from pathlib import Path

PRETRAINED = {
    name: Path(__file__).with_name(f"{name}.safetensors")
    for name in ("digits", "fashion_mnist", "fashion_map")
}
"""The files of the networks, by name."""
