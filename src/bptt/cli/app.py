"""The subcommands put together, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from inspect import getdoc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .. import __version__
from ..train import InputError, NonFiniteError
from ..train.config import ALIASES

__all__ = ["COMMANDS", "app", "run"]

COMMANDS = {
    "train": "Train a language model on a text, a forecast on a series, or a classifier of sequences.",
    "find-lr": "Find a learning rate to begin with: train some steps at rising rates, and draw the loss at each.",
    "sample": "Continue a prompt with the model of a run, printed token by token.",
    "predict": "Forecast how a series goes on, or say which class sequences are of, by the model of a run.",
    "flow": "Measure how far gradients travel: a verdict on the screen, report.html and pictures in a directory.",
    "compare": "Compare gradient policies: bias, cosine, variance, time and memory, as a table and a picture.",
    "demo": "Train on Python's own documentation for a minute or two, sample, report how far its gradients travel.",
    "check": "Compare kernels, equations, autograd and finite differences on small nets of every cell.",
    "bench": "Time bptt against torch.nn, JAX and hand-written code: same inputs, in turn, medians.",
    "info": "Show versions, processor, threads, kernels and optional packages.",
}
"""The commands, each in the module of its name, which is loaded when the command is given."""

SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": {
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: ALIASES.get(name, name),  # in help they would take the room of the words
    },
}

app = typer.Typer(name="bptt", help="Backpropagation through time, made explicit.", **SETTINGS)


class _Interrupted(Exception):  # noqa: N818  # not an error
    """Ctrl-C under another name: typer turns KeyboardInterrupt into an exit status without a word."""


def _interruptible(command: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(command)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt:
            raise _Interrupted from None

    return call


class _Command(TyperCommand):
    """A command by its name: what `bptt --help` needs of it. The command itself is made when its arguments are read."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        module = str(self.name).replace("-", "_")
        function = getattr(import_module(f".{module}", __package__), module)
        alone = typer.Typer(**SETTINGS)
        alone.command(self.name, help=_paragraphs(function))(_interruptible(function))
        return typer.main.get_command(alone).make_context(info_name, args, parent, **extra)


def _paragraphs(command: Callable[..., Any]) -> str:
    """What a command says of itself, a line each paragraph: a terminal breaks them where it ends."""
    return "\n\n".join(" ".join(text.split()) for text in (getdoc(command) or "").split("\n\n"))


for name, summary in COMMANDS.items():
    app.command(name, cls=_Command, help=summary)(lambda: None)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bptt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Backpropagation through time, made explicit: train, sample, predict, flow, compare, check, bench."""


def run(arguments: Sequence[str]) -> int:
    """The exit status of a command line. Raises KeyboardInterrupt when Ctrl-C ends it before its time."""
    try:
        with _warnings_shown():
            status = app(list(arguments) or ["--help"], prog_name="bptt", standalone_mode=False)
    except typer.TyperException as error:  # a wrong option or argument
        return _fail(error.format_message(), 2)
    except _Interrupted:
        raise KeyboardInterrupt from None
    except typer.Abort:
        return _fail("aborted", 130)
    except InputError as error:
        return _fail(str(error), 2)
    except OSError as error:  # a full disk, a directory that may not be written
        name = f"{error.filename}: " if error.filename else ""
        return _fail(f"{name}{error.strerror or error}", 2)
    except NonFiniteError as error:
        return _fail(str(error), 1)
    return int(status or 0)


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Inside `with`, each warning the package logs (a damaged checkpoint passed over) is one line on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("bptt: %(message)s"))
    handler.setLevel(logging.WARNING)
    log = logging.getLogger("bptt")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _fail(message: str, status: int) -> int:
    print(f"bptt: error: {' '.join(message.split())}", file=sys.stderr)
    return status
