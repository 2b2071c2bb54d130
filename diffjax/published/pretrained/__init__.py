"""Two small networks that come with diffjax: `load("digits")` and `load("fashion_mnist")`.

    from diffjax.checkpoint import load
    network, params, config = load("digits")

This project trained them, on 2026-11-23, on two cores of an AMD EPYC with AVX512_BF16, and they are
under its licence, Apache-2.0. Each file holds its config, so that any of it can be done again.

    digits          python train.py                                         1.2 MB, 143 s
    fashion_mnist   python train.py --config=configs/fashion_mnist.py       2.8 MB, 388 s

What they reach, by `evaluate.py` (for Fashion-MNIST with `--n=1000`) and `evaluation.score`; beside
it that of real data:

                                             digits              fashion_mnist
    bits per dimension, held out             2.069 +- 0.017      4.436 +- 0.025
    Frechet distance, 24 components          0.226 (0.190)       14.5 (0.84)
    labels right, by nearest neighbour       97.0 % (98.8 %)     63.0 % (80.3 %)

of 800 samples and the whole data set, and of 1,000 samples and 10,000 random images. They are for
notebooks and first steps; the second stopped early, and its sandals and prints are often broken.
Data: UCI optdigits (CC BY 4.0, `diffjax/data/digits.LICENSE`); Fashion-MNIST (Xiao et al., MIT).
"""

from pathlib import Path

PRETRAINED = {
    name: Path(__file__).with_name(f"{name}.safetensors") for name in ("digits", "fashion_mnist")
}
"""The files of the networks, by name."""
