"""`bptt sample`: text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..train import Config, InputError
from ..train.drawing import check_drawing
from ..train.runs import options_of

__all__ = ["sample"]


def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory of bptt train")],
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    length: Annotated[int, typer.Option(help="tokens to generate")] = 500,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; 1: as the model says")] = 0.8,
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
) -> None:
    """Continue a prompt with the model of a run, printed token by token.

    Same run, prompt and seed: same text. An empty prompt starts from a token drawn by its frequency.
    """
    options_of(run, "text")
    Config.check("device", device)
    try:
        check_drawing(length, temperature, seed)
    except ValueError as error:
        raise InputError(str(error)) from None

    from ..train import RunDirectory, generate
    from ..train.sampling import read_prompt
    from ..train.trained import load

    model, vocabulary, config = load(RunDirectory.open(run), device, "text")
    ids = read_prompt(prompt, vocabulary, config.preprocess)
    tokens = generate(model, vocabulary, ids, length, temperature=temperature, seed=seed)
    separator = "" if vocabulary.level == "char" else " "
    between = separator if ids else ""
    sys.stdout.write(vocabulary.decode(ids))
    for token in tokens:
        sys.stdout.write(between + vocabulary.tokens[token])
        sys.stdout.flush()
        between = separator
    sys.stdout.write("\n")
