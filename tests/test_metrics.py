"""Rows of metrics, compared with the numbers that went into them."""

import functools
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from diffjax.losses import LOG_SNR_EDGES, by_log_snr
from diffjax.training import Losses, init_state, metrics, recorder, train_step
from diffjax.training.recorder import Recorder


def test_losses_are_counted_between_edges_and_the_outer_bins_take_the_rest():
    log_snr = np.random.default_rng(0).uniform(-20, 20, 500).astype(np.float32)
    log_snr[:3] = -12, 0, 11  # an edge belongs to the bin above it
    losses = np.random.default_rng(1).exponential(size=500).astype(np.float32)
    sums, counts = by_log_snr(jnp.asarray(log_snr), jnp.asarray(losses))
    inside = np.clip(log_snr, -12, 11.5)
    histogram = functools.partial(np.histogram, inside, LOG_SNR_EDGES)
    np.testing.assert_allclose(sums, histogram(weights=losses.astype(float))[0], rtol=1e-5)
    np.testing.assert_array_equal(counts, histogram()[0])


def state_and_step(**options):
    """A regression with a noise level for each example, which the loss reports to `measure`."""

    def plain(key, params, batch):
        return (params[None] - batch["x"]) ** 2

    def reporting(key, params, batch, extra):
        losses = plain(key, params, batch)
        return Losses(losses, {"log_snr": batch["log_snr"], "loss": losses})

    loss_fn = reporting if "measure" in options else plain
    tx = optax.adam(0.1)
    state = init_state(jax.random.key(0), jnp.ones(()), tx)
    return state, functools.partial(train_step, loss_fn=loss_fn, tx=tx, ema_decay=0.9, **options)


def batch_of(n):
    random = np.random.default_rng(2)
    x, log_snr = random.standard_normal(n), random.uniform(-14, 3, n)
    index = np.arange(n, dtype=np.int32)
    return {"x": x.astype(np.float32), "log_snr": log_snr.astype(np.float32), "index": index}


def measure(seen):
    return {"by_log_snr": by_log_snr(seen["log_snr"], seen["loss"])}


@pytest.mark.parametrize("layout", ["whole", "parts", "pmap"])
def test_a_step_measures_its_global_batch_and_is_the_same_bit_for_bit(layout):
    batch = batch_of(64)
    results = []
    for options in ({}, {"measure": measure}):
        if layout == "pmap":
            state, run = state_and_step(axis_name="batch", accumulate=2, **options)
            step = jax.pmap(run, "batch", in_axes=(None, 0), out_axes=None)
            split = {k: v.reshape(8, 8) for k, v in batch.items()}
            results.append(step(state, split))
        else:
            state, run = state_and_step(accumulate=4 if layout == "parts" else 1, **options)
            results.append(jax.jit(run)(state, batch))
    (plain, one), (measured, two) = results
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(measured), strict=True):
        if a.dtype != plain.key.dtype:
            np.testing.assert_array_equal(a, b)
    assert set(two) - set(one) == {"by_log_snr"}
    sums, counts = two["by_log_snr"]
    losses = (1 - batch["x"]) ** 2
    inside = np.clip(batch["log_snr"], -12, 11.5)
    histogram = functools.partial(np.histogram, inside, LOG_SNR_EDGES)
    np.testing.assert_allclose(sums, histogram(weights=losses.astype(float))[0], rtol=1e-5)
    np.testing.assert_array_equal(counts, histogram()[0])


def window_of(*batches):
    window = []
    for log_snr, losses in batches:
        pair = jnp.asarray(log_snr, float), jnp.asarray(losses, float)
        step = {"loss": pair[1].mean(), "by_log_snr": by_log_snr(*pair)}
        window.append(step)
    return window


def test_a_row_is_the_mean_over_examples_not_over_steps(tmp_path):
    window = window_of(([0.5, 0.5, 0.5], [1, 2, 3]), ([0.5, -3.5, -3.5], [10, 7, 9]))
    row = metrics.summary(window, 2, lambda step: 0.1)
    expected = {12: (4.0, 4), 8: (8.0, 2)}
    for i, (mean, count) in enumerate(
        zip(row["loss_by_log_snr"], row["count_by_log_snr"], strict=True)
    ):
        assert (mean, count) == expected.get(i, (None, 0))
    assert json.loads(json.dumps(row)) == row

    # The window that a stopped run saves, and the rest, make the same row.
    with Recorder(tmp_path, 0, 30) as recorder:
        recorder.attempt(metrics.save_window, tmp_path, 1, window[:1])
    loaded = metrics.load_window(tmp_path, 1)
    assert metrics.summary(loaded + window[1:], 2, lambda step: 0.1) == row

    # A skipped batch does not enter the means.
    broken = window_of(([5.0], [np.nan]))
    skipped = metrics.summary(window + broken, 3, lambda step: 0.1)
    assert skipped == row | {"skipped": 1}
    assert "loss" not in metrics.summary(broken, 1, lambda step: 0.1)


def screen(written):
    """The lines that a terminal shows after what was written to it, without colours."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[?0-9;]*[A-Za-z]|\n|\r)", written):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif re.fullmatch(r"\x1b\[\d*A", part):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b") and part != "\r":
            lines[row] += part
    return [line for line in lines if line]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_keeps_the_history_and_its_last_line_is_what_is_said_last(
    tmp_path, monkeypatch, terminal
):
    written = io.StringIO()
    console = functools.partial(Console, file=written, force_terminal=terminal, width=100)
    monkeypatch.setattr(recorder, "Console", console)
    values = {"grad_norm": 0.123456, "eval_loss": 0.0123456, "memory": 1.5, "other": 1.234e-5}
    with Recorder(tmp_path, 0, 10**6) as record:
        record.say("compiling ...")
        for step in (10**5, 10**6):
            record.show(step - 1)
            if terminal:
                record.terminal._live.refresh()  # which it does four times a second
                assert screen(written.getvalue())[-1] == f"step {step - 1}/1000000 ..."
            record.write(step, 16, loss=1e-3 * step**0.5, **values)
        record.say("1 s in all")
    lines = screen(written.getvalue())
    assert [line[:40].split("  ")[:2] for line in lines] == [
        ["compiling ..."],
        ["step 100000/1000000", "loss 0.3162"],
        ["step 1000000/1000000", "loss 1"],
        ["1 s in all"],
    ]
    for line in lines[1:3]:
        assert 60 < len(line) <= 100
        assert "  eval_loss 0.01235  " in line and " left  img_per_s " in line


def test_the_rows_of_a_run_divide_its_loss_over_noise_levels(finished):
    """Times are uniform, so the mean over all bins is the loss; the schedule is from -8 to 7."""
    rows = metrics.read(finished)
    assert len(rows) == 4
    for row in rows:
        counts = np.array(row["count_by_log_snr"])
        losses = np.array(row["loss_by_log_snr"], float)
        assert counts.sum() == 10 * 16 and not counts[:4].any() and not counts[19:].any()
        np.testing.assert_array_equal(np.isnan(losses), counts == 0)
        np.testing.assert_allclose(np.nansum(losses * counts) / 160, row["loss"], rtol=1e-5)
