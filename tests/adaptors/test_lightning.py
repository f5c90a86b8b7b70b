"""Lightning itself: pieces along time against a loop, the callbacks through fit, checkpoints and resuming."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

import bptt
from bptt.train import NonFiniteError

pl = pytest.importorskip("lightning.pytorch", reason="needs the extra lightning", exc_type=ImportError)
adaptor = pytest.importorskip("bptt.adaptors.lightning", reason="needs the extra lightning", exc_type=ImportError)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

T, B, I, H, K = 10, 3, 2, 4, 4
LENGTHS = torch.tensor([3, 10, 7])


class Model(adaptor.TruncatedBPTT, pl.LightningModule):
    """Two layers of states of different kinds, in a dict."""

    def __init__(self, lengths: bool = False, packed: bool = False, optimizer: str = "SGD", **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.lstm = nn.LSTM(I, H, 2, batch_first=True, dtype=torch.float64)
        self.gru = nn.GRU(H, 1, batch_first=True, dtype=torch.float64)
        self.lengths, self.packed, self.optimizer = lengths, packed, optimizer
        self.truncated_bptt_steps = K
        self.truncated_bptt_lengths = 2 if lengths else None
        for name, value in settings.items():
            setattr(self, f"truncated_bptt_{name}", value)
        self.seen: list[int] = []
        self.norms: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> dict[str, Any]:
        x, target, *n = batch
        state = {} if hiddens is None else hiddens
        if n and self.packed:
            x = pack_padded_sequence(x, n[0], True, enforce_sorted=False)
        y, lstm = self.lstm(x, state.get("lstm"))
        y, gru = self.gru(y, state.get("gru"))
        if n and self.packed:
            y, _ = pad_packed_sequence(y, True)
        self.seen.append(target.shape[1])
        error = (y[..., 0] - target).square()
        if n:
            valid = torch.arange(target.shape[1]) < n[0][:, None]
            loss = error[valid].sum() / valid.sum()
        else:
            loss = error.mean()
        return {"loss": loss, "hiddens": {"lstm": lstm, "gru": gru}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "LBFGS":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(lengths: bool = False, batches: int = 2) -> DataLoader:
    torch.manual_seed(2)
    x = torch.randn(batches, B, T, I, dtype=torch.float64)
    y = torch.randn(batches, B, T, dtype=torch.float64)
    rows = [(a, b, LENGTHS) if lengths else (a, b) for a, b in zip(x, y, strict=True)]
    return DataLoader(rows, batch_size=None)


def trainer(path: Path, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options = {"max_epochs": 1, "enable_checkpointing": False, **options}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=path, **quiet, **options)


def by_hand(model: Model, loader: DataLoader, update: str, weights: str, clip: float | None = None) -> list[Tensor]:
    """The loop: each lane by itself in whole batches, so that lengths need no bookkeeping. Returns the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in loader:
        x, target = batch[:2]
        n = batch[2].tolist() if len(batch) > 2 else [T] * B
        lstms: list[Any] = [None] * B
        grus: list[Any] = [None] * B
        optimizer.zero_grad()
        first = sum(min(K, length) for length in n)
        for start in range(0, max(n), K):
            total, count = torch.zeros((), dtype=torch.float64), 0
            for lane in range(B):
                stop = min(start + K, n[lane])
                if stop <= start:
                    continue
                y, lstm = model.lstm(x[lane, start:stop], lstms[lane])
                y, gru = model.gru(y, grus[lane])
                lstms[lane], grus[lane] = tuple(s.detach() for s in lstm), gru.detach()
                total = total + (y[:, 0] - target[lane, start:stop]).square().sum()
                count += stop - start
            whole = sum(n) if update == "batch" else first
            (total / count * (count / whole if weights == "steps" else 1)).backward()
            if update == "piece":
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        if update == "batch":
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("form", ["whole", "lengths", "packed"])
@pytest.mark.parametrize("weights", ["steps", "given"])
@pytest.mark.parametrize("update", ["piece", "batch"])
def test_pieces_are_the_loop(tmp_path, agree, form, update, weights):
    options = {"lengths": form != "whole", "packed": form == "packed", "update": update, "weights": weights}
    model = Model(**options)
    expected = by_hand(copy.deepcopy(model), data(form != "whole"), update, weights, clip=0.5)
    run = trainer(tmp_path, gradient_clip_val=0.5)
    run.fit(model, data(form != "whole"))
    agree([p.detach() for p in model.parameters()], expected)
    assert model.seen == [4, 4, 2] * 2
    assert run.global_step == (6 if update == "piece" else 2)
    assert len(model.norms) == run.global_step
    assert model._pieces is None


def test_a_batch_of_pieces_is_chunked(agree):
    """The gradient of one update per batch, against the policy on whole sequences."""
    model = Model(update="batch")
    whole = bptt.convert(copy.deepcopy(model), f"chunked:{K}")
    batch = next(iter(data()))
    model.training_step(batch, 0)["loss"].backward()
    y, _ = whole.lstm(batch[0])
    (whole.gru(y)[0][..., 0] - batch[1]).square().mean().backward()
    agree([p.grad for p in model.parameters()], [p.grad for p in whole.parameters()])


def test_accumulated_batches(tmp_path, agree):
    model = Model(update="batch")
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for batch in data():
        (other.training_step(batch, 0)["loss"] / 2).backward()
    optimizer.step()
    run = trainer(tmp_path, accumulate_grad_batches=2)
    run.fit(model, data())
    agree([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])
    assert run.global_step == 1
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1 with an update after each piece: got 2"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(Model(), data())


@pytest.mark.parametrize("update", ["piece", "batch"])
def test_an_optimizer_that_calls_its_closure_again(tmp_path, update):
    model = Model(update=update, optimizer="LBFGS")
    trainer(tmp_path).fit(model, data(batches=1))
    if update == "piece":
        assert model.seen == [4, 4, 4, 4, 2, 2], "each piece twice, from the same state"
    else:
        assert model.seen == [4, 4, 2, 4, 4, 2]


def test_without_steps_nothing_is_split(tmp_path):
    model = Model(steps=0)
    run = trainer(tmp_path)
    run.fit(model, data())
    assert model.seen == [10, 10]
    assert run.global_step == 2


def test_manual_optimisation_calls_piece_after_piece(tmp_path):
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> dict[str, Any]:
            output = super().training_step(batch, batch_idx, hiddens)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(output["loss"])
            optimizer.step()
            return output

    model = Manual()
    expected = by_hand(copy.deepcopy(model), data(), "piece", "given")
    run = trainer(tmp_path)
    run.fit(model, data())
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)
    assert run.global_step == 6


def test_a_split_of_ones_own(tmp_path):
    class Halves(Model):
        def tbptt_split_batch(self, batch: Any, split_size: int) -> list[Any]:
            return [[part[:, :5] for part in batch], [part[:, 5:] for part in batch]]

    model = Halves()
    trainer(tmp_path).fit(model, data())
    assert model.seen == [5, 5] * 2


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(TypeError, match="TruncatedBPTT must stand before LightningModule: got Late"):

        class Late(pl.LightningModule, adaptor.TruncatedBPTT):
            pass

    class Without(Model):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    class Bare(Model):
        def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> Any:
            return super().training_step(batch, batch_idx, hiddens)["loss"]

    for model, error, words in (
        (Without(), TypeError, "got one without hiddens"),
        (Bare(), TypeError, "must return a dict with 'loss' and 'hiddens': got Tensor"),
        (Model(update="step"), ValueError, "truncated_bptt_update must be 'piece' or 'batch': got 'step'"),
        (Model(weights=None), ValueError, "truncated_bptt_weights must be 'steps' or 'given': got None"),
        (Model(steps=-1), ValueError, "steps must be a whole number of at least 1: got -1"),
    ):
        with pytest.raises(error, match=words):
            trainer(tmp_path).fit(model, data())


# Callbacks -----------------------------------------------------------------------------------------------------------


class Plain(pl.LightningModule):
    """A module as Lightning 2 has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.GRU(I, 1, batch_first=True, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.rnn(batch[0])[0][..., 0] - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def test_the_policy_is_set_and_kept(tmp_path, agree):
    model, callback = Plain(), adaptor.GradientPolicy("chunked:4")
    expected = bptt.convert(copy.deepcopy(model), "chunked:4")
    run = trainer(tmp_path, callbacks=[callback])
    run.fit(model, data())
    assert str(model.rnn.gradient) == "chunked:4"
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.1)
    for batch in data():
        optimizer.zero_grad()
        expected.training_step(batch, 0).backward()
        optimizer.step()
    agree(model.state_dict(), expected.state_dict())

    run.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["GradientPolicy"]
    assert saved == {"gradient": "chunked:4", "layers": {"rnn": "chunked:4"}}
    for given, kept in (
        (adaptor.GradientPolicy(), "chunked:4"),
        (adaptor.GradientPolicy("truncated:3"), "chunked:4"),
        (adaptor.GradientPolicy("truncated:3", restore=False), "truncated:3"),
    ):
        again = Plain()
        resumed = trainer(tmp_path, callbacks=[given], max_epochs=2)
        if str(given.gradient) == "truncated:3" and given.restore:
            with pytest.warns(UserWarning, match="take the place of gradient='truncated:3': chunked:4"):
                resumed.fit(again, data(), ckpt_path=tmp_path / "one.ckpt")
        else:
            resumed.fit(again, data(), ckpt_path=tmp_path / "one.ckpt")
        assert str(again.rnn.gradient) == kept
        assert resumed.global_step == 4


def test_a_layers_own_policy_is_kept_too(tmp_path):
    model, callback = Model(), adaptor.GradientPolicy("chunked:4")
    run = trainer(tmp_path, callbacks=[callback])
    run.fit(model, data())
    model.gru.gradient = "truncated:2"
    run.save_checkpoint(tmp_path / "two.ckpt")
    again, resumed = Model(), trainer(tmp_path, callbacks=[adaptor.GradientPolicy("chunked:4")], max_epochs=2)
    resumed.fit(again, data(), ckpt_path=tmp_path / "two.ckpt")
    assert (str(again.lstm.gradient), str(again.gru.gradient)) == ("chunked:4", "truncated:2")


def test_a_module_without_layers_is_refused(tmp_path):
    class Linear(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.Linear(1, 1)

    with pytest.raises(TypeError, match="must hold an RNN, GRU or LSTM"):
        trainer(tmp_path, callbacks=[adaptor.GradientPolicy("full")]).fit(Linear(), data())
    with pytest.raises(ValueError, match="gradient must be one of"):
        adaptor.GradientPolicy("chunk:4")


def spoilt(*at: int, batches: int = 4) -> DataLoader:
    rows = list(data(batches=batches).dataset)
    for i in at:
        x = rows[i][0].clone()
        x[1, 2] = torch.nan
        rows[i] = (x, rows[i][1])
    return DataLoader(rows, batch_size=None)


def test_the_doctor_stops_before_the_weights_change(tmp_path):
    model = Plain()
    doctor = adaptor.GradientDoctor()
    reached = trainer(tmp_path, callbacks=[doctor])
    with pytest.raises(NonFiniteError, match=r"step 2: forward: `rnn`, step 2, lane 1: its input holds NaN"):
        reached.fit(model, spoilt(1))
    expected = Plain()
    alone = trainer(tmp_path, max_steps=1)
    alone.fit(expected, data(batches=4))
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert not any(m._forward_hooks for m in model.modules()), "no longer watched"


@pytest.mark.parametrize("pieces", [False, True])
def test_the_doctor_leaves_a_step_out(tmp_path, pieces):
    kind = Model if pieces else Plain
    model, expected = kind(), kind()
    doctor = adaptor.GradientDoctor("skip")
    run = trainer(tmp_path, callbacks=[doctor])
    with pytest.warns(UserWarning, match="is left out: forward"):
        run.fit(model, spoilt(1) if not pieces else spoilt(3))
    rows = list(data(batches=4).dataset)
    kept = [rows[0], rows[2], rows[3]] if not pieces else rows[:3]
    trainer(tmp_path).fit(expected, DataLoader(kept, batch_size=None))
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert doctor.skipped == (3 if pieces else 1), "all pieces after it start from its state"
    assert doctor.diagnosis is not None
    run.save_checkpoint(tmp_path / "doctor.ckpt")
    saved = torch.load(tmp_path / "doctor.ckpt", weights_only=True)["callbacks"]["GradientDoctor"]
    assert saved["skipped"] == doctor.skipped
    other = adaptor.GradientDoctor("skip")
    trainer(tmp_path, callbacks=[other], max_epochs=2).fit(kind(), data(), ckpt_path=tmp_path / "doctor.ckpt")
    assert (other.skipped, other.in_a_row) == (doctor.skipped, 0)


def test_the_doctor_does_not_skip_for_ever(tmp_path):
    doctor = adaptor.GradientDoctor("skip")
    with pytest.raises(NonFiniteError, match="step 10, the 10th in a row"):
        trainer(tmp_path, callbacks=[doctor]).fit(Plain(), spoilt(*range(12), batches=12))
    assert doctor.skipped == 9
    with pytest.raises(ValueError, match="on_nonfinite must be 'raise' or 'skip': got 'stop'"):
        adaptor.GradientDoctor("stop")
