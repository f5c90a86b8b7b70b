"""The training loop: one optimiser step at a time, resumable at each of them. Prints nothing, writes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..flow import Diagnosis, Finding, Recording, adapt, watch
from ..policies import Adaptive
from . import generators
from .batches import Batch, Batches
from .carried import State, detach, finite, gathered, lanes_of, packed, to, unpacked
from .config import Config
from .errors import InputError, NonFiniteError
from .network import build_model, check_budget, on_cpu, trial
from .processes import ALONE, Processes, first_cause, quiet
from .rates import factor
from .records import Meter, Record, Step
from .tasks import Task, record_window

__all__ = ["TOO_MANY", "Trainer"]

TOO_MANY = 10
"""Steps in a row that are not finite, after which a run stops that would skip them."""


class Trainer:
    """A task's model, its optimiser, and the place in the data.

    Seeds torch's generator with `config.seed`, and sets torch's thread count where `config.threads` is not 0: both
    are the process's, not this object's.

    A step reads `accumulate` windows; the last step of an epoch may have fewer. Its loss is the summed loss divided by
    the number of predictions in as many *full* windows, so that each weighs the same, those of a shorter last window
    or step included.

    One process alone, until `join`: then several read the lanes of the same windows, and a step is the same step.
    `Step` and `Record` are those of all; what is measured of the gradient's reach is the first process's.

    doctor: what watches the steps (`bptt.flow.watch`). skipped, in_a_row: steps that were not finite and not applied,
    in all and since the last one that was.
    """

    def __init__(self, config: Config, task: Task) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config, self.task = config, task
        self.model = build_model(config, task.stored)
        if config.memory.startswith("checkpoints:bytes"):
            check_budget(config, task, self.model)
        optimiser = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimiser]
        self.optimiser: torch.optim.Optimizer = optimiser(self.model.parameters(), lr=config.learning_rate)
        self.processes = ALONE
        self.replica: torch.nn.Module = self.model  # what a training step calls in the model's place
        self._others: list[dict[str, Any]] = []  # generators of the other processes in the checkpoint
        self.batches: Batches = task.batches(config)
        self.whole = self.batches  # of all processes
        self.step = self.epoch = self.index = 0  # index: windows of this epoch that are done
        self.carry: State = None
        self.meter, self.epoch_meter = Meter(), Meter()
        self.epoch_perplexity: float | None = None  # of the last finished epoch
        self.counts: list[float] = []  # of the task, at the latest measurement
        self.skipped = self.in_a_row = 0
        self.best: dict[str, Any] | None = None  # with patience: loss, step and weights of the best measurement
        self.worse = 0  # measurements since
        self.adapts = isinstance(self.model.recurrent.gradient, Adaptive)
        self._findings: list[Finding] = []
        windows = self.batches.windows(0)
        self.several = min(config.accumulate, windows)  # windows of a full step
        carries = task.carries(config) and windows > 1
        self.doctor = watch(self.model, carries=carries, tell=self._findings.append)

    @property
    def total(self) -> int:
        """Steps of the whole run; of epochs to come as if they were as long as this one.

        They are where lanes are contiguous; where an order is drawn they may differ by a few steps.
        """
        if self.config.steps is not None:
            return self.config.steps
        if self.finished:
            return self.step
        windows, several = self.batches.windows(self.epoch), self.config.accumulate
        later = (self.config.epochs or 0) - self.epoch - 1
        return self.step - (self.index - windows) // several + later * -(-windows // several)

    @property
    def finished(self) -> bool:
        """Whether the run has had all its steps, or has run out of patience."""
        if self.out_of_patience:
            return True
        if self.config.steps is not None:
            return self.step >= self.config.steps
        return self.epoch >= (self.config.epochs or 0)

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` held-out measurements were no better than one before."""
        return 0 < self.config.patience <= self.worse

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        config = self.config
        return config.learning_rate * factor(config.schedule, config.warmup, self.step, self.total)

    def join(self, processes: Processes) -> None:
        """Be one of several processes from now on, each with its share of the lanes and the state carried in them.

        All do so at the same step; those that are not the first then `restore` the first one's state. What they draw
        comes from generators seeded with `config.seed` + rank, until a checkpoint tells them where they stood.
        """
        processes.check(self.config)
        self.processes, self.batches = processes, processes.share(self.batches)
        self.carry = lanes_of(self.carry, processes)
        self.replica = processes.replica(self.model, trial(self.task, self.task.stored, self.model))
        if not processes.first:
            torch.manual_seed(self.config.seed + processes.rank)

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
        end = min(self.index + self.config.accumulate, self.batches.windows(self.epoch))
        windows = [self.batches.window(self.epoch, index) for index in range(self.index, end)]
        start = None if windows[0].fresh else self.carry
        if self.adapts and self.step % self.config.adapt_every == 0:
            self._adapt(start)
        self.model.train()
        self.optimiser.zero_grad()
        mine, carry, diagnosis = self._accumulate(windows, start)
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        grad_norm = float(norm)
        diagnosis = diagnosis or self.doctor.check(mine, grad_norm=grad_norm)
        failures, total = self.processes.sums(diagnosis is not None, mine)
        failed, tokens = failures > 0, sum(window.total for window in windows)
        clipped = not failed and 0 < self.config.clip < grad_norm
        if not failed:
            if clipped:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
            for group in self.optimiser.param_groups:
                group["lr"] = self.learning_rate
            with on_cpu():  # Adam counts its steps in a tensor of no named device
                self.optimiser.step()
            self.carry, self.in_a_row = carry, 0
        else:
            cause, where = first_cause(diagnosis, self.processes)
            self._findings += cause.findings
            self._refuse(f"loss {total / max(1, tokens):g}, gradient norm {grad_norm:g}: not finite{where}; {cause}")
            self.carry = start if self.processes.any(not finite(carry)) else carry
        self.step, self.index = self.step + 1, end
        if self.index == self.batches.windows(self.epoch):
            self.epoch, self.index = self.epoch + 1, 0
        seconds = perf_counter() - started
        step = Step(self.step, self.epoch, total, tokens, grad_norm, clipped, seconds, skipped=failed)
        self.meter.add(step)
        self.epoch_meter.add(step)
        if self.index == 0:
            loss = self.epoch_meter.loss
            self.epoch_perplexity = None if loss is None else self.task.perplexity(loss)
            self.epoch_meter = Meter()
        return step

    def _accumulate(self, windows: list[Batch], state: State) -> tuple[float, State, Diagnosis | None]:
        """Add up the gradients of windows that follow one another.

        Returns the summed loss of this process's lanes, the state after them, and what is not finite in a window before
        the last, which the doctor would not see any more after it. The processes add up their gradients once, with the
        last window's.
        """
        full = self.batches.full * self.several / self.processes.world  # the replica takes the mean over the processes
        total, diagnosis = 0.0, None
        for number, window in enumerate(windows, start=1):
            last = number == len(windows)
            with nullcontext() if last else quiet(self.replica):
                output = self._call(self.replica, window, None if window.fresh else state)
                loss = self.task.loss(output, window)
                (loss / full).backward()
            value, state = float(loss.detach()), detach(output[1])
            total += value
            if not last and diagnosis is None and not (math.isfinite(value) and finite(state)):
                diagnosis = self.doctor.check(value)
        return total, state, diagnosis

    def _adapt(self, start: State) -> None:
        """Measure anew how far the gradient must reach, on all lanes, with dropout off, so that nothing is drawn."""
        self.model.eval()
        window = self.whole.window(self.epoch, self.index)
        recording = record_window(self.task, self.model, window, to(self._whole(start), self.config.device))
        assert isinstance(recording, Recording)  # other cells are refused an adaptive policy
        adapt(recording)
        if self.processes.world > 1:  # machines that round differently must not go different ways
            self.model.recurrent.gradient = self.processes.of_first(str(self.model.recurrent.gradient))

    def _refuse(self, what: str) -> None:
        """Count a step that is not finite. Raises NonFiniteError where the run stops."""
        if self.config.on_nonfinite == "stop":
            raise NonFiniteError(f"step {self.step + 1}: {what}")
        if self.in_a_row + 1 >= TOO_MANY:
            raise NonFiniteError(f"step {self.step + 1}, the {TOO_MANY}th in a row: {what}")
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1

    def take_findings(self) -> list[Finding]:
        """What the doctor found since this was last asked."""
        findings = list(self._findings)
        self._findings.clear()
        return findings

    def evaluate(self, part: Any) -> float:
        """Mean loss per prediction of a part of the task's data, each predicted once.

        Of a text: in nats per token, all but each first one, read in at most `batch` contiguous lanes, each with a
        fresh state at its start, carried through to its end.
        """
        return self.measure(part)[0]

    def measure(self, part: Any) -> tuple[float, dict[str, float]]:
        """(what `evaluate` gives, the task's own measures of the part by name)."""
        windows = self.processes.share(self.task.in_order(part, self.config))
        total, tokens, state = 0.0, 0, None
        counts: Tensor | None = None
        self.model.eval()
        with torch.no_grad():
            for index in range(windows.windows(0)):
                window = windows.window(0, index)
                output = self._call(self.model, window, None if window.fresh else state)
                state = output[1]
                total, tokens = total + float(self.task.loss(output, window)), tokens + window.total
                found = self.task.counts(output, window).cpu()
                counts = found if counts is None else counts + found
        total, *sums = self.processes.sums(total, *([] if counts is None else counts.tolist()))
        self.counts = sums
        return total / tokens, self.task.measures(sums)

    def record(self, heldout: bool) -> Record:
        """Means since the last record, which start anew.

        heldout: measure too: the held-out data, if there are any, and the horizon of the gradient.
        """
        meter, self.meter = self.meter, Meter()
        loss, steps = meter.loss, meter.steps
        examined = self.doctor.examine() if heldout else None
        held, measures = None, None
        if heldout and self.task.heldout is not None:
            held, measures = self.measure(self.task.heldout)
            self._compare_with_best(held)
        return Record(
            step=self.step,
            epoch=self.epoch,
            steps=steps,
            loss=loss,
            perplexity=None if loss is None else self.task.perplexity(loss),
            epoch_perplexity=self.epoch_perplexity,
            heldout_loss=held,
            heldout_perplexity=None if held is None else self.task.perplexity(held),
            grad_norm=meter.grad_norm / steps if steps else None,
            clipped=meter.clipped / steps if steps else None,
            tokens_per_second=meter.tokens / meter.seconds,
            skipped=meter.skipped,
            horizon=None if examined is None else examined.horizon,
            horizon_settled=examined is not None and bool(examined.settled),
            window=self.model.recurrent.gradient.window if self.adapts else None,
            measures=measures or None,
        )

    def _compare_with_best(self, loss: float) -> None:
        """Keep the weights of the best held-out loss, and count how many measurements were no better."""
        if not self.config.patience or (self.best is not None and self.best["step"] == self.step):
            return
        if math.isfinite(loss) and (self.best is None or loss < self.best["loss"]):
            weights = {name: weight.detach().cpu().clone() for name, weight in self.model.state_dict().items()}
            self.best, self.worse = {"loss": loss, "step": self.step, "model": weights}, 0
        else:
            self.worse += 1

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on bit for bit: tensors, numbers and text only.

        Of several processes all must ask for it. It holds all lanes and all generators; any number can go on from it.
        """
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "gradient": str(self.model.recurrent.gradient),  # an adaptive one has the window in use
            "carry": packed(self._whole(self.carry)),
            "position": {"step": self.step, "epoch": self.epoch, "index": self.index},
            "skipped": {"in_all": self.skipped, "in_a_row": self.in_a_row},
            "doctor": self.doctor.state(),
            "meter": asdict(self.meter),
            "epoch_meter": asdict(self.epoch_meter),
            "epoch_perplexity": self.epoch_perplexity,
            "sha256": self.task.sha256,
            **self._generators(),
        }
        if self.processes.world > 1:
            self._others = self.processes.gather(self._generators())[1:]
        if self._others:
            state["other_processes"] = self._others
        if self.config.patience:
            state["best"], state["worse"] = self.best, self.worse
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises InputError when it belongs to other data or another network."""
        try:
            self._restore(state)
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:  # not what `state` gives
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise InputError(f"the checkpoint is not one of this program: {what}") from None

    def _restore(self, state: dict[str, Any]) -> None:
        if state["sha256"] != self.task.sha256:
            raise InputError(f"the {self.task.data} is not the one this run began with")
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise InputError(f"the checkpoint does not fit the configuration: {' '.join(str(error).split())}") from None
        self.optimiser.load_state_dict(state["optimiser"])
        carry = unpacked(state["carry"], lambda: self.model(*trial(self.task, self.task.stored, self.model))[1])
        self.carry = to(lanes_of(carry, self.processes), self.config.device)
        self.step, self.epoch, self.index = (state["position"][name] for name in ("step", "epoch", "index"))
        self.meter, self.epoch_meter = Meter(**state["meter"]), Meter(**state["epoch_meter"])
        self.epoch_perplexity = state["epoch_perplexity"]
        if "doctor" in state:  # not in checkpoints of version 0.1
            self.model.recurrent.gradient = state["gradient"]
            self.skipped, self.in_a_row = state["skipped"]["in_all"], state["skipped"]["in_a_row"]
            self.doctor.restore(state["doctor"])
        self.best, self.worse = state.get("best"), state.get("worse", 0)
        self._others = state.get("other_processes", [])
        every = [state, *self._others]
        if self.processes.rank < len(every):
            drawn = every[self.processes.rank]
            torch.set_rng_state(drawn["generator"])
            generators.restore(drawn.get("generators", {}))
            if "device_generator" in drawn and self._weight.is_cuda:
                torch.cuda.set_rng_state(drawn["device_generator"], self.config.device)

    def _generators(self) -> dict[str, Any]:
        """Where this process's random generators stand: torch's, Python's and NumPy's."""
        states: dict[str, Any] = {"generator": torch.get_rng_state(), "generators": generators.state()}
        if self._weight.is_cuda:
            states["device_generator"] = torch.cuda.get_rng_state(self.config.device)
        return states

    def _whole(self, carry: State) -> State:
        """The state of all processes' lanes, from this process's."""
        if self.processes.world > 1 and not self.task.carries(self.config):
            return None  # not carried; and a last batch may leave a process without a lane
        return gathered(carry, self.processes)

    def _call(self, model: torch.nn.Module, window: Batch, state: State) -> Any:
        """(predictions, the state after them). model: the model or its replica."""
        return model(*self.task.arguments(window, state, self._weight))

    @property
    def _weight(self) -> Tensor:
        """One of the model's, which tells its device and dtype."""
        return next(self.model.parameters())
