"""A whole step of `bptt train`, optimiser included, against the same model on torch.nn's layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..flow import watch
from ..train import Config, Text, Trainer, Vocabulary
from .cases import Case
from .contest import Call, Contest
from .loop import rival, rival_of

__all__ = ["TOKENS", "training_contest"]

TOKENS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "
"""The vocabulary: random text costs as much as any other."""

WINDOWS = 8
"""Of the text, which is read again from its start."""


def training_contest(case: Case, kernel: str = "auto") -> Contest:
    """A trainer on bptt and one on its rival's layer (`loop.rival_of`): windows of T steps, B lanes, embeddings of I.

    The check is of the first step: its loss and every gradient. Seeds torch's generator, as trainers do.

    >>> contest = training_contest(Case("gru", 5, 2, 3, 4))
    >>> {name: error < 1e-5 for name, (error, _) in contest.errors().items()}
    {'bptt': True, 'torch.nn': True}
    """
    vocabulary = Vocabulary.build(TOKENS, "char")
    ids = torch.randint(len(vocabulary), (WINDOWS * case.T * case.B + 1,))
    text = Text(vocabulary, ids, heldout=None, sha256="")
    ours = Trainer(_config(case, kernel), text)
    theirs = _on_rival(Trainer(_config(case), text))
    exact = _on_rival(Trainer(_config(case, dtype="float64"), text))
    names = ("loss", *(name for name, _ in exact.model.named_parameters()))
    truth = [np.asarray(value, dtype=np.float64) for value in _call(exact)()]
    return Contest(names, {"bptt": _call(ours), rival_of(case.cell): _call(theirs)}, truth)


def _config(case: Case, kernel: str = "auto", dtype: str = "float32") -> Config:
    return Config(
        cell=case.cell,
        seq_length=case.T,
        batch=case.B,
        embedding=case.I,
        hidden=case.H,
        gradient=case.gradient,
        kernel=kernel,
        dtype=dtype,
        clip=0.0,  # so that the gradients of a step can be read after it
        steps=2**62,
    )


def _on_rival(trainer: Trainer) -> Trainer:
    """The same trainer with the rival's layer in place of ours: its parameters are the same objects."""
    ours = trainer.model.recurrent
    theirs = rival(trainer.config.cell)(ours.input_size, ours.hidden_size)
    for name, parameter in ours.named_parameters():
        setattr(theirs, name, parameter)
    trainer.model.recurrent = theirs
    trainer.doctor.remove()
    trainer.doctor = watch(trainer.model)
    return trainer


def _call(trainer: Trainer) -> Call:
    def call() -> Sequence[Any]:
        step = trainer.advance()
        return step.nll, *(parameter.grad for parameter in trainer.model.parameters())

    return call
