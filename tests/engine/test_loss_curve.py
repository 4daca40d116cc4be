"""The loss curve: its running mean and its drawing."""

import math

import pytest
from matplotlib.figure import Figure

from xtuner.engine.hooks.loss_curve import draw, running_mean


def test_the_running_mean_does_not_lag():
    assert running_mean([(step, 2.0) for step in range(5)]) == pytest.approx([2.0] * 5)
    falling = [(step, 10.0 - step) for step in range(11)]
    means = running_mean(falling)
    assert means[5] == pytest.approx(5.0)
    assert all(abs(mean - loss) < 1 for mean, (_, loss) in zip(means, falling, strict=True))
    kept = math.exp(-1)
    assert running_mean([(1, 4.0), (2, 1.0)])[0] == pytest.approx((4 + kept) / (1 + kept))


def test_the_running_mean_of_a_long_run_is_smooth():
    losses = [(step, float(step % 2)) for step in range(1000)]
    assert all(0.45 < mean < 0.55 for mean in running_mean(losses)[100:-100])


def test_the_axes_have_room_and_whole_steps(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, file: (drawn.append(figure), save(figure, file))
    )
    losses = [(1, 3.0), (2, 2.0), (3, 1.0)]
    draw(tmp_path / "a.png", losses, [(0, 3.5), (3, 2.0)], [0, 3])
    (axes,) = drawn[0].axes
    assert axes.get_ylim() == pytest.approx((0, 1.08 * 3.5))
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["loss of each step", "running mean", "validation loss", "sample answers"]
    assert (tmp_path / "a.png").stat().st_size > 1000
