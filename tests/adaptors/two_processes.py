"""What each of two processes runs for `test_two_processes`: `two_processes.py FRAMEWORK SETTING LANES FILE`.

LANES: how many of a batch's lanes a process has; one of all lanes is what two are compared with. FILE: of the weights.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

T, B, I, H, K, BATCHES = 10, 6, 2, 4, 4, 3


def batches(lanes: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    """The inputs and targets of a process."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(B, T, I + 1, dtype=torch.float64, generator=generator) for _ in range(BATCHES)]
    return [(own[..., :I], own[..., I]) for own in (b[rank * lanes : (rank + 1) * lanes] for b in made)]


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.LSTM(I, H, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(H, 1, dtype=torch.float64)

    def forward(self, x: Tensor, hiddens: Any = None) -> tuple[Tensor, Any]:
        y, hiddens = self.rnn(x, hiddens)
        return self.head(y)[..., 0], hiddens


def lightning(update: str, lanes: int, file: Path) -> None:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from bptt.adaptors.lightning import GradientDoctor, GradientPolicy, TruncatedBPTT

    class Model(TruncatedBPTT, pl.LightningModule):
        truncated_bptt_steps, truncated_bptt_update = K, update

        def __init__(self) -> None:
            super().__init__()
            self.model = Sequence()

        def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> dict[str, Any]:
            y, hiddens = self.model(batch[0], hiddens)
            return {"loss": (y - batch[1]).square().mean(), "hiddens": hiddens}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self) -> Any:
            return DataLoader(batches(lanes, self.global_rank), batch_size=None)  # type: ignore[arg-type]

    trainer = pl.Trainer(
        accelerator="cpu", devices=B // lanes, strategy="ddp" if lanes < B else "auto", max_epochs=1, logger=False,
        callbacks=[GradientPolicy("full"), GradientDoctor()], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    model = Model()
    trainer.fit(model)
    assert trainer.global_step == (BATCHES * 3 if update == "piece" else BATCHES)
    if trainer.is_global_zero:
        torch.save(model.model.state_dict(), file)


def accelerate(policy: str, lanes: int, file: Path) -> None:
    from accelerate import Accelerator

    from bptt.adaptors.accelerate import GradientDoctor, GradientPolicy

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == B // lanes
    model: Any = Sequence()
    GradientPolicy(policy).attach(accelerator, model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    doctor = GradientDoctor(on_nonfinite="skip")
    doctor.attach(accelerator, model, optimizer)
    for i, (x, target) in enumerate(batches(lanes, accelerator.process_index)):
        if i == 1 and accelerator.is_last_process:  # one process finds it, and both leave the update out
            x = x.index_fill(1, torch.tensor([2]), torch.nan)
        accelerator.backward((model(x)[0] - target).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert doctor.skipped == 1, doctor.skipped
    own = accelerator.unwrap_model(model).state_dict()
    for name, weight in own.items():
        for other in accelerator.gather(weight[None]):
            assert torch.equal(other, weight), name
    if accelerator.is_main_process:
        torch.save(own, file)
    doctor.end()


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
