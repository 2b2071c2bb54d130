"""What the pictures show, read back from their pixels and from the figures' artists."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Circle, StepPatch
from matplotlib.quiver import Quiver
from PIL import Image, ImageSequence

import diffjax
from catalogue import SCHEDULES
from diffjax import losses, oracles, plots, weightings
from diffjax.training import metrics

ROOT = Path(__file__).parents[1]
RANDOM = np.random.default_rng(0)


def lines(ax):
    """The curves of axes by name, `[n, 2]`."""
    return {line.get_label(): line.get_xydata() for line in ax.get_lines()}


def grey(value):
    """The pixel of a value in [-1, 1]."""
    return round((value + 1) * 127.5)


def test_a_grid_has_every_pixel_where_it_belongs():
    x = RANDOM.uniform(-1.2, 1.2, (5, 7, 14, 3)).astype(np.float32)
    picture = np.asarray(plots.image_grid(x, columns=3))
    assert picture.shape == (2 * (7 * 8 + 2), 3 * (14 * 8 + 2), 3)
    for i in range(5):
        row, column = divmod(i, 3)
        cell = picture[row * 58 :, column * 114 :][1:57, 1:113]
        shown = cell[4::8, 4::8]
        np.testing.assert_array_equal(shown, np.round((x[i].clip(-1, 1) + 1) * 127.5))
    assert (picture[58:, 228:] == 255).all()  # where there is no sixth


def test_samples_of_a_class_share_a_row():
    x = np.broadcast_to(np.linspace(-1, 1, 6)[:, None, None, None], (6, 56, 56, 1))
    picture = np.asarray(plots.samples(x, classes=3))  # sample i is of class i % 3
    shown = picture[29::58, 29::58]
    expected = [[grey(v) for v in row] for row in ((-1, 0.2), (-0.6, 0.6), (-0.2, 1))]
    np.testing.assert_array_equal(shown, expected)
    (image,) = plots.sample_grid(x, 3).axes[0].images
    np.testing.assert_array_equal(image.get_array(), picture)
    assert image.get_clim() == (0, 255)  # black is black, however dark the samples are


def test_a_picture_is_of_images_or_points_and_never_of_something_else():
    for shape in ((9, 64, 2), (9, 8, 8, 8, 1)):
        with pytest.raises(ValueError, match=f"samples of shape {re.escape(str(shape))}: need"):
            plots.samples(np.zeros(shape))


@pytest.mark.parametrize("n", [1, 2, 4, 7, 10, 12, 40, 64, 100])
def test_a_grid_of_samples_has_no_holes(n):
    drawn = np.asarray(plots.samples(np.full((n, 56, 56, 1), -1.0)))[29::58, 29::58]
    assert drawn.size == n and not drawn.any()
    assert drawn.shape[0] <= drawn.shape[1] <= 8 * drawn.shape[0]


def test_a_grid_of_samples_of_a_prime_number_is_nearly_full():
    assert (
        plots.samples(np.zeros((97, 8, 8, 1))).size == plots.samples(np.zeros((100, 8, 8, 1))).size
    )


def test_a_strip_shows_the_walk_above_and_its_estimates_below():
    steps, n = 21, 2
    ts = np.linspace(0.95, 0, steps)
    values = np.linspace(-1, 1, steps * n * 2).reshape(2, steps, n)
    x_t, x_0 = np.broadcast_to(values[..., None, None, None], (2, steps, n, 56, 56, 1))
    (ax,) = plots.denoising_strip(x_t, x_0, ts, columns=3).axes
    pixels = ax.images[0].get_array()[29::58, 29::58]
    steps_shown = [0, 10, 20]
    for row, (example, which) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        expected = [grey(values[which, step, example]) for step in steps_shown]
        np.testing.assert_allclose(pixels[row], expected, atol=1)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.95", "0.47", "0"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["$x_t$", r"$\hat x_0$"] * 2
    with pytest.raises(ValueError, match=r"ts \(20,\).*need images"):
        plots.denoising_strip(x_t, x_0, ts[1:])


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_has_the_frames_of_the_walk_and_their_times(tmp_path, suffix):
    walk = RANDOM.uniform(-1, 1, (2, 5, 50, 2))
    frames = plots.walk_frames(*walk)
    assert len(frames) == 5
    for frame, x_t, x_0 in zip(frames, *walk, strict=True):
        pixels = np.asarray(frame)
        np.testing.assert_array_equal(pixels[:, :480], plots.scatter(x_t))
        np.testing.assert_array_equal(pixels[:, -480:], plots.scatter(x_0))

    path = tmp_path / f"walk.{suffix}"
    plots.save_animation(frames, path, seconds=0.1, hold=0.7)
    with Image.open(path) as movie:
        found = [
            (frame.copy().convert("L"), frame.info["duration"])
            for frame in ImageSequence.Iterator(movie)
        ]
        assert movie.info["loop"] == 0
    assert [duration for _, duration in found] == [100, 100, 100, 100, 700]
    for (image, _), frame in zip(found, frames, strict=True):
        np.testing.assert_array_equal(image, frame)


def test_an_animation_that_nothing_could_show_is_refused(tmp_path):
    frame = Image.new("L", (2, 2))
    for frames, name, seconds in (([frame], "a.png", 1), ([], "a.gif", 1), ([frame], "a.gif", 0)):
        with pytest.raises(ValueError, match="need a path"):
            plots.save_animation(frames, tmp_path / name, seconds)
    assert not list(tmp_path.iterdir())


def test_schedules_are_drawn_as_they_are():
    """alpha and sigma of log-SNR, whatever the schedule: log(alpha^2 / sigma^2)."""
    chosen = ("cosine", "rectified_flow", "linear_betas", "log_uniform")
    figure = plots.schedule_curves({name: SCHEDULES[name] for name in chosen})
    assert [ax.get_ylabel() for ax in figure.axes] == ["log-SNR", r"$\alpha_t$", r"$\sigma_t$"]
    curves, alphas, sigmas = (lines(ax) for ax in figure.axes)
    assert list(curves) == list(alphas) == list(sigmas) == list(chosen)
    for name, curve in curves.items():
        (t, log_snr), alpha, sigma = curve.T, alphas[name][:, 1], sigmas[name][:, 1]
        assert t[0] == 0 and t[-1] == 1
        keep = abs(log_snr) < 15
        np.testing.assert_allclose(
            2 * np.log(alpha[keep] / sigma[keep]), log_snr[keep], atol=1e-3, err_msg=name
        )
    np.testing.assert_allclose(alphas["rectified_flow"][:, 1], 1 - t, atol=1e-3)
    assert figure.axes[2].get_yscale() == "log"  # a variance that explodes is among them


def test_weights_are_drawn_as_they_are():
    schedule = diffjax.cosine()
    chosen = {"elbo": weightings.elbo(), "min_snr": weightings.min_snr()}
    weigh = {k: losses.effective_weight(schedule, "eps", w) for k, w in chosen.items()}
    (ax,) = plots.weight_curves(weigh, -9, 30).axes
    log_snr, elbo = lines(ax)["elbo"].T
    inside = log_snr < 15
    np.testing.assert_allclose(elbo[inside], np.exp(log_snr[inside]) / 2, rtol=1e-3)
    assert np.isnan(elbo[log_snr > 15.1]).all()  # where the schedule never is
    assert set(lines(ax)) == set(chosen) and ax.get_yscale() == "log"


def test_the_loss_by_log_snr_is_a_stair_without_the_empty_steps():
    values = [None, *np.linspace(1, 2, 23)]
    rows = {"a": {"step": 1, "loss_by_log_snr": values}, "old": {"step": 1}}
    (ax,) = plots.loss_by_log_snr(rows).axes
    (stairs,) = (patch for patch in ax.patches if isinstance(patch, StepPatch))
    heights, edges, _ = stairs.get_data()
    np.testing.assert_array_equal(edges, losses.LOG_SNR_EDGES)
    assert np.isnan(heights[0])
    np.testing.assert_array_equal(heights[1:], values[1:])


def test_training_curves_of_runs_share_axes():
    runs = {
        "a": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}],
        "b": [{"step": 1, "loss": 5.0}, {"step": 3}],
    }
    (ax,) = plots.training_curves(runs).axes
    found = [(line.get_color(), line.get_xydata().tolist()) for line in ax.lines]
    one, two, *_ = plots.COLOURS
    assert found == [(one, [[1, 3], [2, 2]]), (one, [[2, 2.5]]), (two, [[1, 5]])]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_progress_is_drawn_of_any_run(finished):
    for rows in ([], [{"step": 5, "loss": 1.0}], metrics.read(finished)):
        assert plots.progress(rows).size == (960, 360)
    drawn = np.asarray(Image.open(finished / "loss.png"))
    np.testing.assert_array_equal(drawn, plots.progress(metrics.read(finished)))


def test_convergence_says_the_order():
    n = np.array([8, 16, 32])
    (ax,) = plots.convergence({"one": (n, 3.0 / n), "two": (n[1:], 5.0 / n[1:] ** 2)}).axes
    found = lines(ax)
    assert list(found) == ["one, order 1.0", "two, order 2.0"]
    np.testing.assert_allclose(found["two, order 2.0"], [[16, 5 / 256], [32, 5 / 1024]])
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["8", "16", "32"]


def test_terms_of_the_bound_have_their_mean_and_its_error():
    ts, batch = np.linspace(0.1, 0.9, 5), RANDOM.uniform(1, 2, (5, 100))
    (ax,) = plots.bound_terms(ts, {"each": batch, "known": np.ones(5)}).axes
    found = lines(ax)
    np.testing.assert_allclose(found["each"], np.stack([ts, batch.mean(1)], 1))
    np.testing.assert_allclose(found["known"][:, 1], 1)
    (band,) = ax.collections
    low, high = band.get_paths()[0].get_extents().get_points()[:, 1]
    error = batch.std(1, ddof=1) / 10
    np.testing.assert_allclose(low, (batch.mean(1) - error).min(), rtol=1e-6)
    np.testing.assert_allclose(high, (batch.mean(1) + error).max(), rtol=1e-6)


def test_contours_hold_their_share_of_a_gaussian():
    """In two dimensions the density at the edge of mass m is 1 - m of that at the centre."""
    standard = lambda x: -0.5 * (x**2).sum(-1) + 7  # up to a constant
    (ax,) = plots.density(standard, -4, 4).axes
    (contours,) = ax.collections
    expected = [1 - mass for mass in plots.MASSES]
    np.testing.assert_allclose(contours.levels, expected, atol=0.01)
    assert ax.get_aspect() == 1


@pytest.mark.parametrize("equal", [False, True])
def test_arrows_stand_where_the_field_is_evaluated(equal):
    schedule = diffjax.cosine()
    oracle = oracles.gaussian(schedule, [0.5, -1.0], 0.3)
    score = lambda x: oracle.score(x, 0.5)
    (ax,) = plots.vector_field(score, -2, 2, n=5, equal=equal).axes
    (arrows,) = (a for a in ax.collections if isinstance(a, Quiver))
    assert len(np.unique(arrows.XY, axis=0)) == 25
    alpha, sigma = (float(scale) for scale in schedule(0.5))
    expected = -(arrows.XY - alpha * np.array([0.5, -1.0])) / (0.3 * alpha**2 + sigma**2)
    if equal:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.stack([arrows.U, arrows.V], 1), expected, rtol=1e-4, atol=1e-5)


def test_trajectories_run_from_rings_to_dots():
    x = RANDOM.standard_normal((7, 3, 2))
    (ax,) = plots.trajectories(x).axes
    *paths, rings, dots = ax.lines
    for i, path in enumerate(paths):
        np.testing.assert_array_equal(path.get_xydata(), x[:, i])
    np.testing.assert_array_equal(rings.get_xydata(), x[0])
    np.testing.assert_array_equal(dots.get_xydata(), x[-1])
    assert rings.get_markerfacecolor() == "white" != dots.get_markerfacecolor()


def test_arrows_and_circles_are_in_sight_and_labelled():
    figure, (ax,) = plots.panels()
    plots.arrow(ax, [0, 0], [30, 0], "eps")
    plots.circle(ax, [5, 20], 15, "std")
    drawn, label = ax.texts[:2]
    assert (drawn.xyann, drawn.xy) == ((0, 0), (30, 0)) and drawn.arrow_patch is not None
    assert label.get_text() == "eps" and label.xy == (15, 0) and label.xyann[1] > 0  # on its left
    (circle,) = (patch for patch in ax.patches if isinstance(patch, Circle))
    assert circle.center == (5, 20) and circle.radius == 15
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert left < -10 and right > 30 and bottom < 0 and top > 35 and ax.get_aspect() == 1
    assert ax.texts[2].get_text() == "std" and ax.texts[2].xy == (5, 35)
    assert figure.axes == [ax]


def test_pictures_compose():
    figure, axes = plots.panels(2, 3)
    assert len(axes) == 6
    for k in range(14):
        axes[5].plot([k])
    assert len({(line.get_color(), line.get_linestyle()) for line in axes[5].lines}) == 14
    assert plots.schedule_curves({"cosine": diffjax.cosine()}, axes[:3]) is figure
    assert plots.convergence({"one": ([1, 2], [1.0, 0.5])}, axes[3]) is figure
    assert plots.trajectories(np.zeros((2, 1, 2)), axes[4]) is figure
    assert [bool(ax.lines) for ax in axes] == [True] * 6
    assert plots.rendered(figure).size == (3 * 480, 2 * 360)


def test_colours_differ_for_the_colour_blind():
    """To whom two of three receptors are left, the third being the one for red or for green.

    The receptors are those of Vienot et al. 1999; Matplotlib's default colours have 0.10.
    """
    linear = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in plots.COLOURS])
    linear = (linear / 255) ** 2.2
    lms = np.array([[0.178, 0.435, 0.041], [0.0346, 0.2715, 0.0387], [0.0003, 0.0018, 0.0147]])
    l, m, s = lms @ linear.T
    for a, b in ((l, s), (m, s)):
        seen = np.log(np.stack([a, b], 1))
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distance[~np.eye(len(seen), dtype=bool)].min() > 0.3


@pytest.mark.faults  # a quarter of a minute
def test_the_page_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/plots.md").read_text(), re.S)
    scope = {}
    exec(block, scope)
    assert len(scope["frames"]) == 20 and len(scope["strip"].axes) == 1


def test_only_figures_need_matplotlib_and_they_say_so(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(plots)
    plots.samples(np.zeros((4, 8, 8, 1)))
    with pytest.raises(ModuleNotFoundError, match=r"need matplotlib: pip install '\.\[plots\]' in"):
        plots.sample_grid(np.zeros((4, 8, 8, 1)))
