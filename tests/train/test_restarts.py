"""Processes of which one dies: they are started again, and the run goes on."""

from __future__ import annotations

import os
import signal
from contextlib import redirect_stdout
from pathlib import Path
from threading import Thread
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from torch.distributed import HashStore
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bptt.cli import main
from bptt.train import InputError, RunDirectory, Trainer, fit
from bptt.train.distributed import start_or_resume
from bptt.train.processes import ALONE, Processes, own_part

from .forked import forked, server
from .outcomes import run_to
from .tiny import tiny, write_text

pytestmark = pytest.mark.slow


def dying(folder: Path, arguments: list[str]) -> None:
    """The command line in a process that dies once, in the middle of a run. It notes the first step it takes.

    A replica that lets go of the process group after its end could wait for ever for gloo's threads.
    """
    rank, started = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    advance, note = Trainer.advance, folder / f"start-{started}-{rank}"
    end = torch.distributed.destroy_process_group

    replica: list[ReferenceType[Any]] = []

    def last(self: Trainer) -> Any:
        replica[:] = [ref(self.replica.reducer)]
        if not note.exists():
            note.write_text(str(self.step))
        if (self.step, rank, started) == (12, "1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(self)

    def ended() -> None:
        assert [each() for each in replica] == [None]
        end()

    Trainer.advance = last
    torch.distributed.destroy_process_group = ended
    with (folder / f"out-{rank}").open("w") as out, redirect_stdout(out), pytest.raises(SystemExit, match="0"):
        main(arguments)


def test_a_worker_that_is_killed_is_started_again_and_the_run_ends_as_it_would_have(tmp_path: Path):
    config = tiny(write_text(tmp_path), dropout=0.2)
    (tmp_path / "run.toml").write_text(config.to_toml())
    torchrun = LaunchConfig(  # what its command line makes of --standalone --nproc-per-node 2 --max-restarts 1
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        monitor_interval=0.1,
        start_method=server().get_start_method(),
    )
    options = ["train", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")]
    elastic_launch(torchrun, dying)(tmp_path, options)
    assert [(tmp_path / f"start-{s}-{rank}").read_text() for s in (0, 1) for rank in (0, 1)] == ["0", "0", "7", "7"]
    assert "sample from it" in (tmp_path / "out-0").read_text()
    assert (tmp_path / "out-1").read_text() == ""
    forked(2, tmp_path, run_to, tmp_path / "whole", config, 20)
    whole, killed = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "run")
    torch.testing.assert_close(killed.weights(), whole.weights(), rtol=0, atol=0)
    assert [m["loss"] for m in killed.metrics()] == [m["loss"] for m in whole.metrics()]


def test_a_restart_resumes_this_very_run_and_no_other(tmp_path: Path):
    config, again = tiny(write_text(tmp_path), steps=3), Processes(restarted=True)
    trainer, run = start_or_resume(again, config, tmp_path / "run")  # died before it began
    assert fit(trainer, run) is None
    assert start_or_resume(again, config, tmp_path / "run", overwrite=True)[0].step == 3
    with pytest.raises(InputError, match="holds a run"):
        start_or_resume(again, config.override(hidden=9), tmp_path / "run")
    with pytest.raises(InputError, match="holds a run"):
        start_or_resume(ALONE, config, tmp_path / "run")


def test_a_restart_needs_a_directory_to_find(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(SystemExit):
        main(["train"])
    message = "bptt: error: --max-restarts needs a directory where the run is found again: give --out DIR\n"
    assert capsys.readouterr().err == message


def test_processes_started_again_meet_where_the_dead_have_not_been():
    store = HashStore()
    for _ in range(3):
        parts: list[Any] = [None] * 3

        def meet(rank: int, parts: list[Any] = parts) -> None:
            parts[rank] = own_part(store, rank, 3)

        threads = [Thread(target=meet, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert not parts[0].check(["address"])
        parts[0].set("address", "here")
        assert [part.get("address") for part in parts] == [b"here"] * 3
