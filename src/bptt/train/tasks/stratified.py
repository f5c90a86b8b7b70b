"""A part of labelled things that has of every class the same share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["stratified"]


def stratified(labels: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(indices that stay, indices taken out), each in order: about `share` of every class, drawn by `seed`.

    Of n things of a class floor(share n) are taken, and one more of those classes with the largest remainders until
    round(share N) of all N are; never the last of a class.

    >>> stay, out = stratified(["a"] * 8 + ["b"] * 4, 0.25, seed=0)
    >>> len(stay), sum(i < 8 for i in out), sum(i >= 8 for i in out)
    (9, 2, 1)
    """
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    most = {label: len(of) - 1 for label, of in members.items()}
    chosen = {label: min(int(share * len(of)), most[label]) for label, of in members.items()}
    rest = round(share * len(labels)) - sum(chosen.values())
    for label in sorted(members, key=lambda label: chosen[label] - share * len(members[label])):
        if rest > 0 and chosen[label] < most[label]:
            chosen[label], rest = chosen[label] + 1, rest - 1
    generator = torch.Generator("cpu").manual_seed(seed)
    out = []
    for label, of in members.items():
        order = torch.randperm(len(of), generator=generator, device="cpu")
        out += [of[i] for i in order[: chosen[label]]]
    return sorted({*range(len(labels))} - {*out}), sorted(out)
