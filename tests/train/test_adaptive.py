"""Training with an adaptive window: when it is measured, and that a resumed run has it."""

from pathlib import Path

import torch

from bptt.policies import Adaptive, Truncated
from bptt.train import Trainer, prepare

from .tiny import tiny, write_text

ADAPTIVE = {"gradient": "adaptive:0.5,max=9", "adapt_every": 4, "dropout": 0.2}


def trainer(tmp_path: Path, **options: object) -> Trainer:
    config = tiny(write_text(tmp_path), **(ADAPTIVE | options))
    return Trainer(config, prepare(config))


def test_the_window_is_measured_every_so_often(tmp_path: Path) -> None:
    training = trainer(tmp_path, adapt_every=4)
    assert training.model.recurrent.gradient == Adaptive(0.5, 9)
    windows = []
    for step in training.run():
        windows.append(training.model.recurrent.gradient.window)
        if step.step % 4 == 0:  # what a measurement leaves is kept until the next one
            training.model.recurrent.gradient = Adaptive(0.5, 9, window=9)
    assert [len(set(windows[i : i + 4])) for i in range(0, 20, 4)] == [1] * 5
    assert all(1 <= w < 9 for w in windows)


def test_measuring_draws_and_changes_nothing_else(tmp_path: Path) -> None:
    """With the window found, the same steps as under the truncated policy of that window."""
    one = trainer(tmp_path, adapt_every=100)
    list(one.run())
    window = one.model.recurrent.gradient.window
    other = trainer(tmp_path, gradient=str(Truncated(window)))
    list(other.run())
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)


def test_twenty_steps_are_seven_and_thirteen(tmp_path: Path) -> None:
    """The window in use is part of what is saved: the break is between two measurements."""
    whole = trainer(tmp_path, cell="lstm", layers=2)
    list(whole.run())
    first = trainer(tmp_path, cell="lstm", layers=2)
    for _ in range(7):
        first.advance()
    state = first.state()  # torch's generator too, which the next trainer seeds
    second = trainer(tmp_path, cell="lstm", layers=2)
    second.restore(state)
    assert second.model.recurrent.gradient == first.model.recurrent.gradient != Adaptive(0.5, 9)
    list(second.run())
    assert second.model.recurrent.gradient == whole.model.recurrent.gradient
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
