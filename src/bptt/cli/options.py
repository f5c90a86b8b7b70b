"""Training options as flags: one per field of `Config`, so that name, meaning and check have one home."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

import typer

from ..train import Config
from ..train.config import ALIASES, GROUPS

__all__ = ["with_training_options"]

C = TypeVar("C", bound=Callable[..., Any])


def with_training_options(*, without: Collection[str] = ()) -> Callable[[C], C]:
    """Give a command one flag per training option; those on the command line arrive in its `**options`.

    A flag that is not given arrives as None, so that the command can tell it from the default. without: options that
    the command does not take.
    """
    return lambda command: _with_options(command, without)


def _with_options(command: C, without: Collection[str]) -> C:
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    hints = get_type_hints(Config)
    added, group = [], ""
    for option in fields(Config):
        group = GROUPS.get(option.name, group)
        if option.name in without:
            continue
        choices = option.metadata["check"].choices
        notes = [", ".join(choices)] if choices else []
        default = option.metadata["default"]
        notes += [] if default is None or default is False else [f"default: {default}"]
        note = f" ({'; '.join(notes)})" if notes else ""
        also = "".join(f"; also --{other}" for other, name in ALIASES.items() if name == option.name)
        name = option.name.replace("_", "-")
        flag = typer.Option(
            None,
            f"--{name}",
            help=f"{option.metadata['meaning']}{also}{note}",
            rich_help_panel=group,
        )
        added.append(
            inspect.Parameter(
                option.name, inspect.Parameter.KEYWORD_ONLY, default=flag, annotation=hints[option.name] | None
            )
        )
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]  # read by inspect
    return command
