"""The arithmetic stays as exact as docs/numerics.md says it is, on all of [0, 1]."""

import importlib
from pathlib import Path

import pytest

from catalogue import SCHEDULES, slow

ROOT = Path(__file__).parents[1]

# About twice the worst of docs/numerics.md, over all schedules: float32, bfloat16. Where bfloat16
# is nothing but casts the bound is theirs: 2^-8 = 3.9e-3 each.
BOUNDS = {
    "log_snr": (6e-6, 6e-6),  # its spacing is 1e-6 at 15; the data's dtype has no say
    "alpha": (3e-6, 4e-3),  # half the absolute error of log-SNR
    "sigma": (1.3e-6, 4e-3),
    "alpha_of_log_snr": (2e-7, 4e-3),  # two roundings: a logistic function and a root
    "sigma_of_log_snr": (2e-7, 4e-3),
    "mean": (6e-6, 6e-2),  # draws of up to 3.7, a handful of roundings each
    "std_far": (1e-6, 1.2e-2),  # bfloat16: two factors and their product
    "std_10": (1e-6, 1.2e-2),
    "std_100": (2e-5, 1.2e-2),  # neighbours: log-SNR's error over its small difference
    "std_1000": (2.4e-4, 1.7e-2),
    "convert_5": (8e-6, 0.7),  # exp(5 / 2) roundings, and so on
    "convert_10": (1e-4, 4.0),
    "convert": (3e-2, 20.0),  # discrete schedules reach 24; bfloat16 is of no use there
    "roundings": (26.0, 19.0),  # the same without the conditioning: what the arithmetic adds
    "non_finite": (0, 0),
}


@pytest.fixture(scope="module")
def numerics():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "studies")
        return importlib.import_module("numerics")


HALF = ["cosine", "rectified_flow", "linear_betas"]  # other scales, and a table


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[("cosine", "float32"), ("log_uniform", "bfloat16")],
        *slow(*((name, "float32") for name in SCHEDULES if name != "cosine")),
        *slow(*((name, "bfloat16") for name in HALF)),
    ],
)
def test_errors_are_within_the_contract(numerics, name, dtype):
    if name not in numerics.SCHEDULES:
        pytest.skip("studies/numerics.py has no reference of 50 digits for it")
    found = numerics.measure(name, dtype)
    assert found.keys() == BOUNDS.keys()
    for key, (single, half) in BOUNDS.items():
        bound = single if dtype == "float32" else half
        assert found[key] <= bound, (key, found[key], bound)  # not a number: not within either


def test_the_page_has_every_schedule(numerics):
    lines = (ROOT / "docs" / "numerics.md").read_text().splitlines()
    for name in numerics.SCHEDULES:
        rows = sum(line.startswith(f"| {name} |") for line in lines)
        assert rows == 4, f"{name}: write docs/numerics.md by python studies/numerics.py"
