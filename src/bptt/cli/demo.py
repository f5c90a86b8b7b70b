"""`bptt demo`: real text learned in a minute or two, and what its gradients did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text as Words

from ..train import Config
from .flow import measured, require_pictures, settled, write_report

__all__ = ["demo"]

CONFIG = Config(
    corpus="python-docs",
    cell="gru",
    hidden=256,
    embedding=64,
    dropout=0.1,
    gradient="chunked:32",
    batch=32,
    seq_length=64,
    steps=1400,
    learning_rate=0.004,
    threads=1,
    eval_every=200,
    save_every=400,
)
"""Two minutes on two cores. One thread: a second one gains little at this size, and loses much on shared cores."""

DIRECTORY = Path("runs/demo")
PROMPT = "The "


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="run directory, replaced if it holds a run")] = DIRECTORY,
    steps: Annotated[int | None, typer.Option(help="optimiser steps", show_default=f"{CONFIG.steps}")] = None,
) -> int:
    """Train on Python's own documentation for a minute or two, sample, report how far its gradients travel, and say
    where everything lies.
    """
    config = CONFIG if steps is None else CONFIG.override(steps=steps)
    require_pictures()

    from ..train import LanguageModel, Text, generate, start
    from ..train.sampling import read_prompt
    from .progress import train_with_progress
    from .subject import subject

    task = Text.prepare(config)
    trainer, run = start(config, out, overwrite=True, task=task)
    console = Console(stderr=True)
    console.print(
        f"a {config.cell.upper()} of {config.hidden} units learns Python's own documentation, one character at a time: "
        "perplexity is per character",
        highlight=False,
        soft_wrap=True,
    )
    status = train_with_progress(trainer, run, console)
    if status != 0:
        return status
    vocabulary = task.vocabulary
    held = run.metrics()[-1]["heldout_perplexity"]
    ids = read_prompt(PROMPT, vocabulary, config.preprocess)
    drawn = generate(cast("LanguageModel", trainer.model.eval()), vocabulary, ids, 400, temperature=0.7)
    text = PROMPT + vocabulary.decode(drawn)
    of = settled(lambda steps: subject(run.path, steps, None), console)
    found = measured(of, of.recording.T, console)
    report = write_report(found, of.directory)
    shown = Console()
    shown.print(Panel(Words(text), title="a sample, temperature 0.7", highlight=False))
    shown.print(
        Panel(
            Words(
                f"held-out perplexity  {held:.2f}  per character, after {trainer.step} steps of {config.gradient}\n"
                f"guessing by frequency {task.unigram():.2f}  (by character, the same held-out text)\n\n"
                f"{found.verdict.plain or found.verdict.headline}\n"
                f"how far gradients travel, in pictures: open {report} in a browser\n\n"
                f"everything lies in {run.path}/\n"
                f"more text:   bptt sample {run.path} --prompt 'The ' --temperature 0.5\n"
                f"more steps:  bptt train --resume {run.path} --steps {2 * trainer.step}"
            ),
            title="bptt demo",
        )
    )
    return 0
