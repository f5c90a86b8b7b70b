"""`bptt train --tensorboard`: a run's records and heat maps as TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from ..flow import Scanned, lag_map
from ..train import Record, RunDirectory, Trainer
from ..train.extras import require
from ..train.inspection import record_next
from ..train.options import LANES

__all__ = ["board", "require_tensorboard"]

SCALARS = {
    "loss": "loss/training",
    "heldout_loss": "loss/held-out",
    "perplexity": "perplexity/training",
    "heldout_perplexity": "perplexity/held-out",
    "grad_norm": "gradient/norm",
    "clipped": "gradient/clipped",
    "horizon": "gradient/horizon",
    "window": "gradient/window",
    "skipped": "gradient/skipped",
    "tokens_per_second": "speed/tokens per second",
}
"""The tag of each field of a record that is drawn as a curve. A horizon that is not settled has one of its own."""


def require_tensorboard() -> None:
    """Raise InputError where tensorboard, or what draws the maps, is not installed."""
    require("tensorboard", "tensorboard")
    require("matplotlib", "plots")


@contextmanager
def board(trainer: Trainer, run: RunDirectory) -> Iterator[Callable[[Record], None]]:
    """What writes a record to RUN/tensorboard: its numbers and, where the horizon was measured, the (t, lag) maps of
    the window that comes next.

    A resumed run goes on in the same place: what an earlier one wrote after its last checkpoint is hidden.
    """
    plots, events = require("bptt.plots", "plots"), require("torch.utils.tensorboard", "tensorboard")
    with events.SummaryWriter(str(run.path / "tensorboard"), purge_step=trainer.step + 1) as writer:

        def write(record: Record) -> None:
            for name, value in asdict(record).items():
                if name in SCALARS and value is not None:
                    least = ", at least" if name == "horizon" and not record.horizon_settled else ""
                    writer.add_scalar(SCALARS[name] + least, value, record.step)
            for name, value in (record.measures or {}).items():
                writer.add_scalar(f"held-out/{name}", value, record.step)
            if record.horizon is not None:
                of = record_next(trainer)
                map = lag_map(of, lanes=min(LANES, of.B)) if isinstance(of, Scanned) else lag_map(of.sample(LANES))
                for i, layer in enumerate(map.layers):
                    writer.add_figure(f"lag map/{layer}", plots.lag_map(map, layer=i), record.step)
            writer.flush()

        yield write
