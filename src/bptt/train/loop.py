"""The training loop: one optimiser step at a time, resumable at each of them. Prints nothing, writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..flow import Finding, adapt, watch
from ..policies import Adaptive
from .batches import IGNORE, Batches, RandomWindows, Sequential, Window
from .config import Config, bad_device
from .dataset import Dataset
from .errors import InputError, NonFiniteError
from .model import LanguageModel, State, detach, record_window
from .records import Meter, Record, Step, perplexity

__all__ = ["TOO_MANY", "Trainer", "build_model"]

TOO_MANY = 10
"""Steps in a row that are not finite, after which a run stops that would skip them."""


def build_model(config: Config, size: int) -> LanguageModel:
    """The network of a run over `size` tokens. Raises InputError for options that do not go together."""
    _try_device(config)
    try:
        model = LanguageModel(
            size,
            cell=config.cell,
            nonlinearity=config.nonlinearity,
            layers=config.layers,
            hidden=config.hidden,
            embedding=config.embedding,
            dropout=config.dropout,
            gradient=config.gradient,
            memory=config.memory,
            kernel=config.kernel,
        )
        model = model.to(device=config.device, dtype=getattr(torch, config.dtype)).eval()
        with torch.no_grad():  # a kernel that refuses: heard of before anything is written
            model(torch.zeros(1, 1, dtype=torch.int64, device=config.device))
        return model
    except (ValueError, RuntimeError) as error:
        raise InputError(str(error).splitlines()[0]) from error


def _try_device(config: Config) -> None:
    """Raise InputError for a device that cannot hold a number of the dtype and give it back (`meta` cannot)."""
    try:
        torch.zeros((), device=config.device, dtype=getattr(torch, config.dtype)).cpu()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # all are ways of torch to say no
        raise bad_device(config.device, error) from error


class Trainer:
    """A model, its optimiser, and the place in the text.

    Seeds torch's generator with `config.seed`, and sets torch's thread count where `config.threads` is not 0: both
    are the process's, not this object's.

    The loss of a step is the summed NLL divided by the number of tokens of a *full* window, so that every token
    weighs the same, those of a shorter last window included.

    doctor: what watches the steps (`bptt.flow.watch`). skipped, in_a_row: steps that were not finite and not applied,
    in all and since the last one that was.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config, self.dataset = config, dataset
        self.model = build_model(config, len(dataset.vocabulary))
        optimiser = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimiser]
        self.optimiser: torch.optim.Optimizer = optimiser(self.model.parameters(), lr=config.learning_rate)
        self.batches: Batches = (
            Sequential(dataset.train, config.seq_length, config.batch)
            if config.batching == "sequential"
            else RandomWindows(dataset.train, config.seq_length, config.batch, config.seed)
        )
        self.step = self.epoch = self.index = 0  # index: windows of this epoch that are done
        self.carry: State = None
        self.meter, self.epoch_meter = Meter(), Meter()
        self.epoch_perplexity: float | None = None  # of the last finished epoch
        self.skipped = self.in_a_row = 0
        self.adapts = isinstance(self.model.recurrent.gradient, Adaptive)
        self._findings: list[Finding] = []
        carries = config.batching == "sequential" and self.batches.windows(0) > 1
        self.doctor = watch(self.model, carries=carries, tell=self._findings.append)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        if self.config.steps is not None:
            return self.config.steps
        return sum(self.batches.windows(epoch) for epoch in range(self.config.epochs or 0))

    @property
    def finished(self) -> bool:
        """Whether the run has had all its steps."""
        if self.config.steps is not None:
            return self.step >= self.config.steps
        return self.epoch >= (self.config.epochs or 0)

    def run(self) -> Iterator[Step]:
        """Take the steps that remain, one per item."""
        while not self.finished:
            yield self.advance()

    def advance(self) -> Step:
        """Take one step.

        Where loss, gradient or final state are not finite, the weights stay as they are. With on_nonfinite="skip" the
        step counts as skipped, and the state to carry is the last finite one; else, and after `TOO_MANY` in a row, it
        raises NonFiniteError with the diagnosis.
        """
        started = perf_counter()
        window = self.batches.window(self.epoch, self.index)
        start = None if window.fresh else self.carry
        if self.adapts and self.step % self.config.adapt_every == 0:
            self._adapt(window, start)
        self.model.train()
        self.optimiser.zero_grad()
        nll, carry = self._nll(window.inputs, window.targets, start)
        (nll / self.batches.full).backward()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        total, grad_norm = float(nll.detach()), float(norm)
        diagnosis = self.doctor.check(total, grad_norm=grad_norm)
        clipped = diagnosis is None and 0 < self.config.clip < grad_norm
        if diagnosis is None:
            if clipped:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
            self.optimiser.step()
            self.carry, self.in_a_row = detach(carry), 0
        else:
            self._findings += diagnosis.findings
            self._refuse(f"loss {total / window.tokens:g}, gradient norm {grad_norm:g}: not finite; {diagnosis}")
            self.carry = detach(carry) if _finite(carry) else start
        self.step, self.index = self.step + 1, self.index + 1
        if self.index == self.batches.windows(self.epoch):
            self.epoch, self.index = self.epoch + 1, 0
        seconds = perf_counter() - started
        step = Step(
            self.step, self.epoch, total, window.tokens, grad_norm, clipped, seconds, skipped=diagnosis is not None
        )
        self.meter.add(step)
        self.epoch_meter.add(step)
        if self.index == 0:
            loss = self.epoch_meter.loss
            self.epoch_perplexity = None if loss is None else perplexity(loss)
            self.epoch_meter = Meter()
        return step

    def _adapt(self, window: Window, start: State) -> None:
        """Measure anew how far the gradient must reach, with dropout off, so that nothing is drawn."""
        self.model.eval()
        adapt(record_window(self.model, window, start))

    def _refuse(self, what: str) -> None:
        """Count a step that is not finite. Raises NonFiniteError where the run stops."""
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"step {self.step + 1}: {what}")
        if self.in_a_row + 1 >= TOO_MANY:
            raise NonFiniteError(f"step {self.step + 1}, the {TOO_MANY}th in a row: {what}")
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1

    def take_findings(self) -> list[Finding]:
        """What the doctor found since this was last asked."""
        taken = list(self._findings)
        self._findings.clear()
        return taken

    def evaluate(self, ids: Tensor) -> float:
        """Mean NLL in nats per predicted token over `ids` `[N]`, every token but the first predicted once.

        Read in at most `batch` contiguous lanes, each with a fresh state at its start, carried through to its end.
        """
        windows = Sequential(ids, self.config.seq_length, min(self.config.batch, len(ids) - 1))
        total, tokens, state = 0.0, 0, None
        self.model.eval()
        with torch.no_grad():
            for window in windows:
                nll, state = self._nll(window.inputs, window.targets, state)
                total, tokens = total + float(nll), tokens + window.tokens
        return total / tokens

    def record(self, heldout: bool) -> Record:
        """Means since the last record, which start anew.

        heldout: measure too: the held-out text, if there is one, and the horizon of the gradient.
        """
        meter, self.meter = self.meter, Meter()
        loss, steps = meter.loss, meter.steps
        horizon = self.doctor.examine().horizon if heldout else None
        held = self.evaluate(self.dataset.heldout) if heldout and self.dataset.heldout is not None else None
        return Record(
            step=self.step,
            epoch=self.epoch,
            steps=steps,
            loss=loss,
            perplexity=None if loss is None else perplexity(loss),
            epoch_perplexity=self.epoch_perplexity,
            heldout_loss=held,
            heldout_perplexity=None if held is None else perplexity(held),
            grad_norm=meter.grad_norm / steps if steps else None,
            clipped=meter.clipped / steps if steps else None,
            tokens_per_second=meter.tokens / meter.seconds,
            skipped=meter.skipped,
            horizon=horizon,
            window=self.model.recurrent.gradient.window if self.adapts else None,
        )

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on bit for bit: tensors, numbers and text only."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "gradient": str(self.model.recurrent.gradient),  # an adaptive one has the window in use
            "carry": self.carry,
            "position": {"step": self.step, "epoch": self.epoch, "index": self.index},
            "skipped": {"in_all": self.skipped, "in_a_row": self.in_a_row},
            "doctor": self.doctor.state(),
            "meter": asdict(self.meter),
            "epoch_meter": asdict(self.epoch_meter),
            "epoch_perplexity": self.epoch_perplexity,
            "generator": torch.get_rng_state(),
            "sha256": self.dataset.sha256,
        }
        if self.model.output.weight.is_cuda:
            state["device_generator"] = torch.cuda.get_rng_state(self.config.device)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises InputError when it belongs to another text or network."""
        if state["sha256"] != self.dataset.sha256:
            raise InputError("the text is not the one this run began with")
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise InputError(f"the checkpoint does not fit the configuration: {' '.join(str(error).split())}") from None
        self.optimiser.load_state_dict(state["optimiser"])
        self.carry = _to(state["carry"], self.config.device)
        self.step, self.epoch, self.index = (state["position"][name] for name in ("step", "epoch", "index"))
        self.meter, self.epoch_meter = Meter(**state["meter"]), Meter(**state["epoch_meter"])
        self.epoch_perplexity = state["epoch_perplexity"]
        if "doctor" in state:  # not in checkpoints of version 0.1
            self.model.recurrent.gradient = state["gradient"]
            self.skipped, self.in_a_row = state["skipped"]["in_all"], state["skipped"]["in_a_row"]
            self.doctor.restore(state["doctor"])
        torch.set_rng_state(state["generator"])
        if "device_generator" in state and self.model.output.weight.is_cuda:
            torch.cuda.set_rng_state(state["device_generator"], self.config.device)

    def _nll(self, inputs: Tensor, targets: Tensor, state: State) -> tuple[Tensor, State]:
        """Summed NLL `[]` of a window, and the state after it."""
        inputs, targets = inputs.to(self.config.device), targets.to(self.config.device)
        logits, state = self.model(inputs, state)
        nll = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return nll, state


def _to(state: State, device: str) -> State:
    """The same state on a device."""
    if state is None:
        return None
    return state.to(device) if isinstance(state, Tensor) else (state[0].to(device), state[1].to(device))


def _finite(state: State) -> bool:
    """Whether all of a state is finite."""
    states = () if state is None else (state,) if isinstance(state, Tensor) else state
    return all(bool(torch.isfinite(s).all()) for s in states)
