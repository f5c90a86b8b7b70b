"""The training loop: one optimiser step at a time, resumable at each of them. Prints nothing, writes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .batches import IGNORE, Batches, RandomWindows, Sequential
from .config import Config, bad_device
from .dataset import Dataset
from .errors import InputError, NonFiniteError
from .model import LanguageModel, State, detach

__all__ = ["Meter", "Record", "Step", "Trainer", "build_model", "perplexity"]


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    step: steps so far, this one included. epoch: passes finished. nll: summed over the window, in nats.
    tokens: predicted. grad_norm: global norm before clipping. clipped: whether it was above `clip`.
    seconds: of this step.
    """

    step: int
    epoch: int
    nll: float
    tokens: int
    grad_norm: float
    clipped: bool
    seconds: float


@dataclass
class Meter:
    """Sums over steps: those since the last record, or those of an epoch."""

    steps: int = 0
    nll: float = 0.0
    tokens: int = 0
    grad_norm: float = 0.0
    clipped: int = 0
    seconds: float = 0.0

    def add(self, step: Step) -> None:
        """Count one step."""
        self.steps += 1
        self.nll += step.nll
        self.tokens += step.tokens
        self.grad_norm += step.grad_norm
        self.clipped += step.clipped
        self.seconds += step.seconds


@dataclass(frozen=True)
class Record:
    """What is logged: means over the steps since the last record.

    step, epoch: as in `Step`. steps: how many the means are over. loss: nats per predicted token. perplexity:
    exp(loss). epoch_perplexity: exp(total NLL / predicted tokens) over the steps of the last epoch that is finished,
    each with the weights of its time; None before one is. heldout_*: measured at this step, or None. grad_norm: mean
    norm before clipping. clipped: fraction of steps. tokens_per_second: training alone.
    """

    step: int
    epoch: int
    steps: int
    loss: float
    perplexity: float
    epoch_perplexity: float | None
    heldout_loss: float | None
    heldout_perplexity: float | None
    grad_norm: float
    clipped: float
    tokens_per_second: float


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that overflows.

    >>> perplexity(0.0), perplexity(1e6)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


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
        """Take one step. Raises NonFiniteError, the weights untouched, when loss or gradient are not finite."""
        started = perf_counter()
        window = self.batches.window(self.epoch, self.index)
        self.model.train()
        self.optimiser.zero_grad()
        nll, carry = self._nll(window.inputs, window.targets, None if window.fresh else self.carry)
        (nll / self.batches.full).backward()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        total, grad_norm = float(nll.detach()), float(norm)
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            raise NonFiniteError(
                f"step {self.step + 1}: loss {total / window.tokens:g}, gradient norm {grad_norm:g}: not finite; "
                "lower learning_rate, or clip the gradient"
            )
        clipped = 0 < self.config.clip < grad_norm
        if clipped:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        self.optimiser.step()
        self.carry = detach(carry)
        self.step, self.index = self.step + 1, self.index + 1
        if self.index == self.batches.windows(self.epoch):
            self.epoch, self.index = self.epoch + 1, 0
        step = Step(self.step, self.epoch, total, window.tokens, grad_norm, clipped, perf_counter() - started)
        self.meter.add(step)
        self.epoch_meter.add(step)
        if self.index == 0:
            self.epoch_perplexity = perplexity(self.epoch_meter.nll / self.epoch_meter.tokens)
            self.epoch_meter = Meter()
        return step

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
        """Means since the last record, which start anew. heldout: measure the held-out text too, if there is one."""
        meter, self.meter = self.meter, Meter()
        loss = meter.nll / meter.tokens
        held = self.evaluate(self.dataset.heldout) if heldout and self.dataset.heldout is not None else None
        return Record(
            step=self.step,
            epoch=self.epoch,
            steps=meter.steps,
            loss=loss,
            perplexity=perplexity(loss),
            epoch_perplexity=self.epoch_perplexity,
            heldout_loss=held,
            heldout_perplexity=None if held is None else perplexity(held),
            grad_norm=meter.grad_norm / meter.steps,
            clipped=meter.clipped / meter.steps,
            tokens_per_second=meter.tokens / meter.seconds,
        )

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on bit for bit: tensors, numbers and text only."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "carry": self.carry,
            "position": {"step": self.step, "epoch": self.epoch, "index": self.index},
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
