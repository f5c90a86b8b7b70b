"""Frameworks that run a training loop over any model: each with its own loop, on the same model and data."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .training import PIECE, B, Row, Tagger, batches, folder, samples

LEARNING_RATE = 1e-3


def lightning(cell: str, ours: bool, steps: int, cut: bool) -> list[float]:
    """Lightning's Trainer. cut: truncated, by a loop over pieces and detached states, or by a policy."""
    import lightning.pytorch as pl

    from bptt.adaptors.lightning import GradientPolicy

    found: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Tagger(cell)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            if cut and not ours:
                state, loss = None, torch.zeros(())
                for piece, of in zip(x.split(PIECE, 1), y.split(PIECE, 1), strict=True):
                    out, state = self.net.rnn(piece, state)
                    state = tuple(s.detach() for s in state) if cell == "LSTM" else state.detach()
                    loss = loss + nn.functional.mse_loss(self.net.head(out), of) * (piece.shape[1] / x.shape[1])
            else:
                loss = nn.functional.mse_loss(self.net(x), y)
            found.append(float(loss))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), LEARNING_RATE)

    with folder() as path:
        trainer = pl.Trainer(
            default_root_dir=path,
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[GradientPolicy(f"chunked:{PIECE}" if cut else "full")] if ours else [],
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(samples(steps), B))
    return found


def accelerate(cell: str, ours: bool, steps: int) -> list[float]:
    """Accelerate's loop."""
    from accelerate import Accelerator

    from bptt.adaptors.accelerate import GradientPolicy

    accelerator, model = Accelerator(cpu=True), Tagger(cell)
    if ours:
        GradientPolicy("full").attach(accelerator, model)
    loader = torch.utils.data.DataLoader(samples(steps), B)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), LEARNING_RATE), loader)
    found = []
    for x, y in loader:
        loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def transformers(cell: str, ours: bool, steps: int) -> list[float]:
    """transformers' Trainer, with the policy in the model's configuration."""
    import transformers as hf

    from bptt.adaptors.transformers import PolicyFromConfig

    class Config(hf.PretrainedConfig):
        model_type = "tagger"

    class Model(PolicyFromConfig, hf.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.net = Tagger(cell)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            loss = nn.functional.mse_loss(self.net(x), labels)
            found.append(float(loss))
            return {"loss": loss}

    found: list[float] = []
    data = [{"x": x, "labels": y} for x, y in samples(steps)]
    with folder() as path:
        arguments = hf.TrainingArguments(
            path,
            per_device_train_batch_size=B,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        hf.Trainer(Model(Config(bptt_gradient="full") if ours else Config()), arguments, train_dataset=data).train()
    return found


def ignite(cell: str, ours: bool, steps: int) -> list[float]:
    """ignite's engine."""
    from ignite.engine import Events, create_supervised_trainer

    from bptt.adaptors.ignite import GradientPolicy

    model = Tagger(cell)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    engine = create_supervised_trainer(model, optimizer, nn.functional.mse_loss)
    if ours:
        GradientPolicy("full").attach(engine, model)
    found: list[float] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: found.append(engine.state.output))
    engine.run(batches(steps), max_epochs=1)
    return found


def skorch(cell: str, ours: bool, steps: int) -> list[float]:
    """skorch's net."""
    import skorch as theirs

    from bptt.adaptors.skorch import NeuralNetRegressor

    x, y = samples(steps).tensors
    net = (NeuralNetRegressor if ours else theirs.NeuralNetRegressor)(
        Tagger,
        module__cell=cell,
        optimizer=torch.optim.Adam,
        lr=LEARNING_RATE,
        batch_size=B,
        max_epochs=1,
        train_split=None,
        iterator_train__shuffle=False,
        verbose=0,
        **({"gradient": "full"} if ours else {}),
    )
    net.fit(x, y)
    return [batch["train_loss"] for batch in net.history[-1, "batches"]]


def opacus(cell: str, ours: bool, steps: int) -> list[float]:
    """opacus's private training without noise and with clipping that bites, its own layer or ours."""
    from opacus import PrivacyEngine
    from opacus.layers import DPGRU, DPLSTM
    from opacus.validators import ModuleValidator

    import bptt.adaptors.opacus  # teaches the validator

    model = Tagger(cell)
    if ours:
        model = ModuleValidator.fix(bptt.convert(model))
    else:
        private = {"LSTM": DPLSTM, "GRU": DPGRU}[cell](model.rnn.input_size, model.rnn.hidden_size, batch_first=True)
        private.load_state_dict(model.rnn.state_dict())
        model.rnn = private
    loader = torch.utils.data.DataLoader(samples(steps), B)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        poisson_sampling=False,
    )
    found = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return found


LOOPS = [
    ("Lightning", "lightning", ("lightning",), "Trainer", partial(lightning, cut=False)),
    (
        "Lightning, truncated",
        "lightning",
        ("lightning",),
        f"Trainer; pieces of {PIECE} steps with detached states against chunked:{PIECE}",
        partial(lightning, cut=True),
    ),
    ("accelerate", "accelerate", ("accelerate",), "its training loop", accelerate),
    ("transformers", "transformers", ("transformers",), "Trainer", transformers),
    ("ignite", "pytorch-ignite", ("ignite",), "supervised trainer", ignite),
    ("skorch", "skorch", ("skorch",), "NeuralNetRegressor.fit", skorch),
    ("opacus", "opacus", ("opacus",), "PrivacyEngine, clipped gradients of samples, no noise", opacus),
]

ROWS = [
    Row(f"{name}, {cell}", package, needs, what, partial(run, cell))
    for name, package, needs, what, run in LOOPS
    for cell in ("LSTM", "GRU")
]
