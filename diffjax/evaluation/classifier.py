"""Train a small classifier of Fashion-MNIST, whose activations are a feature space for images.

    python -m diffjax.evaluation.classifier --data_path=/usr/share/datasets/fashion-mnist

prints the classifier's accuracy on held-out images. This command, with its defaults, made the
weights that come with the package (`WEIGHTS`).
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from safetensors import numpy as safetensors

from .. import data
from ..experiment.command_line import error_exit, read_flags
from ..types import Array, Key

WEIGHTS = Path(__file__).with_name("fashion_classifier.safetensors")
"""The parameters of `Classifier`."""
SHAPE = (28, 28, 1)
"""The shape of its images."""


class Classifier(nn.Module):
    """Three convolutions of stride 2, and a hidden layer of 64."""

    @nn.compact
    def __call__(self, x: Array, dropout: Key | None = None) -> tuple[Array, Array]:
        """Images `[n, 28, 28, 1]` in [-1, 1] -> logits `[n, 10]`, the hidden layer `[n, 64]`."""
        for width in (32, 64, 96):  # pooling would train seven times slower on a CPU
            x = nn.relu(nn.Conv(width, (3, 3), strides=(2, 2))(x))
        hidden = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        dropped = nn.Dropout(0.3)(hidden, deterministic=dropout is None, rng=dropout)
        return nn.Dense(10)(dropped), hidden


def load(path: Path = WEIGHTS) -> Any:
    """Load the parameters of a `Classifier`, for `Classifier().apply({"params": params}, x)`."""
    return traverse_util.unflatten_dict(safetensors.load_file(path), sep=".")


def save(params: Any, path: Path) -> None:
    """Write parameters to a file, which `load` reads."""
    flat = traverse_util.flatten_dict(jax.device_get(params), sep=".")
    safetensors.save_file({name: np.ascontiguousarray(x) for name, x in flat.items()}, path)


def accuracy(params: Any, examples: data.Examples) -> float:
    """The fraction of examples whose most likely class is the label."""
    logits = jax.jit(lambda x: Classifier().apply({"params": params}, x)[0])
    right = 0
    for start in range(0, len(examples.x), 1000):
        index = np.arange(start, min(start + 1000, len(examples.x)))
        part = data.take(examples, index)
        right += int((logits(part["x"]).argmax(-1) == part["label"]).sum())
    return right / len(examples.x)


def train(examples: data.Examples, epochs: int, batch_size: int, seed: int) -> Any:
    """Train with Adam, a cosine decay of its rate to 0, and random mirroring; return parameters."""
    steps = epochs * (len(examples.x) // batch_size)
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    key_params, key_dropout = jax.random.split(jax.random.key(seed))
    model = Classifier()

    @jax.jit
    def step(params, opt_state, key, batch):
        def loss(params):
            logits, _ = model.apply({"params": params}, batch["x"], key)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    params = model.init(key_params, jnp.zeros((1, *SHAPE)))["params"]
    opt_state = tx.init(params)
    fetch = lambda k: data.train_batch(examples, seed, k, batch_size, flip=True)
    for k, batch in enumerate(data.prefetch(fetch, range(steps))):
        params, opt_state = step(params, opt_state, jax.random.fold_in(key_dropout, k), batch)
    return params


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How to train the classifier."""

    data_path: Path | None = None
    """Fashion-MNIST's folder; None for its default place."""
    out: Path = Path("fashion_classifier.safetensors")
    """File to which the weights are written."""
    epochs: int = 10
    """Passes over the data."""
    batch_size: int = 128
    """Images per step."""
    seed: int = 0
    """Seed of all random numbers."""


def main() -> None:
    """Run the command."""
    args = read_flags(Arguments, sys.argv[1:], __doc__)
    with error_exit():
        train_set, test_set = data.load("fashion_mnist", args.data_path)
    began = time.perf_counter()
    params = train(train_set, args.epochs, args.batch_size, args.seed)
    save(params, args.out)
    right = accuracy(load(args.out), test_set)
    print(
        f"{args.out}: accuracy {right:.2%} on {len(test_set.x):,} held-out images, "
        f"{time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
