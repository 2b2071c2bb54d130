"""Measure how far pairs of a batch are from the optimal map, and write docs/howto/couplings.md.

python studies/couplings.py  # a minute on one core
"""

import datetime
import functools
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from diffjax import couplings
from markdown_table import table

ROOT = Path(__file__).parents[1]
BATCHES = (2, 8, 32, 128, 512)
DIMENSIONS = (1, 2, 16, 784)
EXAMPLES = 4096
"""Number of examples over which each number is a mean."""
COUPLINGS = {
    "ot": couplings.ot(),
    "ot by Sinkhorn": couplings.ot(exact=0),
    "immiscible, k = 4": couplings.immiscible(),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def pairs(coupling, batch, d, key):
    """A batch of standard normal data, and the noise that it is given."""
    key_x, key_eps, key = jax.random.split(key, 3)
    x_0, eps = jax.random.normal(key_x, (batch, d)), jax.random.normal(key_eps, (batch, d))
    return x_0, coupling(jax.random.split(key, batch), x_0, eps, None)


def moments(coupling, batch, d):
    """The correlation of data and noise, and the mean square of the noise."""
    drawn = [
        pairs(coupling, batch, d, key)
        for key in jax.random.split(jax.random.key(0), max(EXAMPLES // batch, 8))
    ]
    x_0, eps = (np.concatenate(each) for each in zip(*drawn, strict=True))
    square = (eps**2).mean()
    return (x_0 * eps).mean() / np.sqrt((x_0**2).mean() * square), square


def rows():
    """Rows of coupling, batch, and the correlation in each number of dimensions."""
    for name, coupling in COUPLINGS.items():
        batches = BATCHES if name.startswith("ot") else BATCHES[-1:]
        for batch in batches:
            found = (moments(coupling, batch, d)[0] for d in DIMENSIONS)
            yield [name, batch if len(batches) > 1 else "any", *(f"{x:.3f}" for x in found)]


PAGE = """\
# Couplings of data and noise

In training, each example is mixed with noise. The noise is drawn for it independently, unless you
choose another coupling:

```
python train.py --config.schedule=rectified_flow --config.target=flow --config.coupling=ot
python train.py --config.coupling=immiscible --config.coupling_options k=8
```

| coupling | the noise of an example |
|---|---|
| `independent` | its own |
| `ot` | exchanged within the batch, by optimal transport: the sum of squared distances is least |
| `immiscible` | the nearest of k noises of its own |

`ot` pairs the whole batch, over all devices, and only examples of the same label. Batches of up to
512 examples are paired exactly, on the host, larger ones by Sinkhorn's iterations, on the device
(`--config.coupling_options exact=512 epsilon=0.02 iterations=100`). In Python:

```python
import jax, diffjax

x_0 = jax.random.normal(jax.random.key(0), (128, 2))
network = lambda x_t, log_snr, cond: x_t
loss = diffjax.diffusion_loss(
    jax.random.key(1),
    network,
    diffjax.rectified_flow(),
    "flow",
    x_0,
    coupling=diffjax.couplings.ot(),
)
```

## What is gained

Lines from noise to data cross less, so that the flow is straighter and needs fewer steps. How much
less depends on the batch and on the number of dimensions. For normal data the optimal map is known:
it takes each noise to a multiple of itself, a correlation of 1 between data and noise, and
independent pairs have a correlation of 0. Pairs of a batch have

{rows}
In 784 dimensions a batch is far too small for the optimal map: all noises are nearly equally far
from an example. In one dimension the correlation is known in closed form, and a test holds it.

## What is lost

- Only with independent noise is -E[eps | x_t] / sigma the score. Stochastic samplers need the
  score, and are refused; deterministic ones follow the flow of the pairs, whatever they are, and
  that carries noise to data.
- The variational bound needs independent noise. `weighting=elbo`, `bound_weight` and the bound of
  `evaluate.py` are refused; `evaluate.py --flow=True` counts bits by the flow.
- With `immiscible` the noise in training is no longer normal. With k = 4 its mean square in 1, 2,
  16 and 784 dimensions is {squares}, not 1. A sampler starts from normal noise,
  so that its start is a little off.
- Pairs across labels would tell a conditional network something about the noise by the label. `ot`
  exchanges noise only among examples of the same condition, so that with many labels in a small
  batch it changes little.

Measured by `python studies/couplings.py` on {date}: JAX {jax}, CPU.
"""


def main():
    """Write docs/howto/couplings.md."""
    head = ["coupling", "batch", *(f"{d} dimension{'s' * (d > 1)}" for d in DIMENSIONS)]
    near = COUPLINGS["immiscible, k = 4"]
    squares = ", ".join(f"{moments(near, 512, d)[1]:.3f}" for d in DIMENSIONS)
    page = PAGE.format(
        rows=table(head, rows()),
        squares=squares,
        date=datetime.date.today(),
        jax=jax.__version__,
    )
    (ROOT / "docs" / "howto" / "couplings.md").write_text(page)


if __name__ == "__main__":
    main()
