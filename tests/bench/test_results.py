from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bptt.bench import Case, Results, judge, markdown, steps_markdown
from bptt.bench.results import Machine, geometric_mean

from .made_up import LARGE, MACHINE, SMALL, row


@pytest.mark.parametrize(("cell", "gates"), [("rnn", 1), ("gru", 3), ("lstm", 4)])
def test_useful_operations(cell: str, gates: int):
    """Three products with [W_ih W_hh], 2 operations for each of its G H (I + H) entries, at T B steps."""
    assert Case(cell, 2, 3, 5, 7).flop == 3 * 2 * gates * 7 * (5 + 7) * 2 * 3


def test_ratio_and_share():
    one = row(bptt=0.5, torch_nn=1.0, JAX=0.25, gemm=4.0 * Case("lstm", *SMALL).flop)
    assert (one.ratio("torch.nn"), one.ratio("JAX"), one.ratio("nobody")) == (2.0, 0.5, None)
    assert one.share == pytest.approx(0.5)
    assert one.wrong == []
    assert row("rnn", table="windows", gradient="truncated:4", bptt=1.0).share is None


def test_who_is_wrong_has_no_ratio():
    one = row(bptt=1.0, torch_nn=1.0, JAX=2.0, wrong="torch.nn")
    assert (one.wrong, one.ratio("torch.nn"), one.ratio("JAX")) == (["torch.nn"], None, 2.0)
    one = row(bptt=1.0, torch_nn=1.0, wrong="bptt")
    assert (one.wrong, one.ratio("torch.nn"), one.share) == (["bptt"], None, None)


def test_an_error_that_is_not_a_number_is_wrong():
    one = row(bptt=1.0, torch_nn=1.0)
    one.errors["torch.nn"] = float("nan")
    assert one.wrong == ["torch.nn"]


def test_a_machine_that_is_busy_with_something_else():
    one = row(bptt=1.0, threads=2)
    assert not one.disturbed
    assert replace(one, cores=1.7).disturbed


def test_geometric_mean():
    assert geometric_mean([1.0, 10.0, 100.0]) == pytest.approx(10.0)


def test_json_and_back():
    rows = (row(bptt=1.0, torch_nn=2.0), row("rnn", table="windows", gradient="chunked:3", bptt=1.0, wrong="bptt"))
    results = Results(MACHINE, "auto", rows)
    assert Results.from_json(results.to_json()) == results


def test_json_of_before_first_calls_were_kept():
    entries = json.loads(Results(MACHINE, "auto", (row(bptt=1.0),)).to_json())
    del entries["rows"][0]["first"]
    [one] = Results.from_json(json.dumps(entries)).rows
    assert one.first == {}


def test_more_rows_take_the_place_of_those_of_the_same():
    one, two = row(bptt=1.0), row("rnn", bptt=2.0)
    results = Results(MACHINE, "auto", (one, two)).extended([row(bptt=3.0), row(bptt=4.0, threads=2)])
    assert [(r.case.cell, r.threads, r.times["bptt"].median) for r in results.rows] == [
        ("lstm", 1, 3.0), ("rnn", 1, 2.0), ("lstm", 2, 4.0),
    ]  # fmt: skip


def test_rows_have_the_commit_of_their_time():
    old = replace(MACHINE, commit="abc")
    [one] = Results.from_json(Results(old, "auto", (replace(row(bptt=1.0), commit="abd"),)).to_json()).rows
    assert one.commit == "abd"
    entries = json.loads(Results(old, "auto", (row(bptt=1.0),)).to_json())
    del entries["rows"][0]["commit"]
    [one] = Results.from_json(json.dumps(entries)).rows
    assert one.commit == "abc"


def test_machines_that_differ():
    assert MACHINE.differs(replace(MACHINE, commit="x", date="2030-01-01")) == []
    assert MACHINE.differs(replace(MACHINE, torch="3.0", cores=4)) == ["cores", "torch"]


def test_markdown_says_who_refused_and_what_the_layers_are():
    steps = replace(
        row("lif", table="steps", scan=0.001), missing={"eager": "no", "compiled": "it took longer than 60 s"}
    )
    stack = row(table="stacks", bptt=0.001, torch_nn=0.002)
    stack = replace(stack, case=replace(stack.case, layers=2, both_ways=True), commit="abc")
    text = markdown(Results(MACHINE, "auto", (steps, stack)))
    assert "rows of 2 commits." in text
    assert "| lif | 100, 1, 32 | 1 ms | refuses | > 60 s at first | 3 ms |" in text
    assert "| layers, both ways, packed, LSTM, 2 layers, both ways | 100, 1, 32, 32 | 1 ms | torch.nn 2× |" in text


def test_this_machine():
    machine = Machine.here("a processor", 2)
    assert machine.processor == "a processor"
    assert machine.torch
    assert "/" not in (machine.commit or "")


def verdicts(*rows) -> list[str]:
    return [str(verdict) for verdict in judge(rows)]


def test_never_slower():
    rows = [row(shape=LARGE, bptt=1.0, torch_nn=2.0, JAX=0.9, gemm=1e3, threads=2), row(bptt=1.0, torch_nn=1.0, JAX=3)]
    first, small, *_ = verdicts(*rows)
    assert first == ("missed: never slower than torch.nn and JAX, by 1 of 2: LSTM (100, 64, 256, 256), 2 threads: 0.9x")
    assert small == (
        "missed: >= 2x torch.nn's LSTM at (100, 1, 32, 32), by 1 of 1: LSTM (100, 1, 32, 32), 1 thread: 1x"
    )


def test_shares_where_they_count():
    flop = Case("gru", *LARGE).flop
    rows = [row("gru", LARGE, bptt=1.0, torch_nn=9.0, gemm=flop / share) for share in (0.9, 0.7, 0.5)]
    where = "GRU (100, 64, 256, 256), 1 thread:"
    assert verdicts(*rows)[1:3] == [
        f"missed: share >= 85% where B*H >= 8192, by 2 of 3: {where} 50%; {where} 70%",
        f"missed: share >= 60% where B*H >= 2048, by 1 of 3: {where} 50%",
    ]
    assert not any("share" in verdict for verdict in verdicts(row("gru", bptt=1.0, torch_nn=30.0)))


def test_means_are_taken_per_number_of_threads():
    rows = [
        row(cell, bptt=1.0, torch_nn=t, threads=n)
        for n, a in ((1, 26.0), (2, 1.0))
        for cell, t in (("rnn", a), ("gru", 2 * a))
    ]
    assert (
        verdicts(*rows)[-1]
        == "missed: geometric mean >= 4x torch.nn over RNN and GRU rows, by 1 of 2: 2 threads: 1.41x"
    )


def test_two_loops_on_one_thread():
    shape = (1000, 1, 64, 64)
    rows = [
        row("rnn", shape, table="windows", gradient="truncated:32", threads=n, bptt=1.0, two_loops=t)
        for n, t in ((1, 120.0), (2, 60.0))
    ]
    goal = ">= 100x the two-loop code, truncated:32, T = 1000, B = 1, H = 64, 1 thread"
    assert verdicts(*rows) == [f"met: {goal}"]


def test_steps_against_the_loop_jax_and_the_layer():
    rows = [
        row("gru", table="steps", scan=1.0, loop=12.0, JAX=0.9, module=0.9),
        row("leaky", table="steps", scan=1.0, loop=9.0, JAX=1.0),
        row("lif", (100, 32, 128, 128), table="steps", threads=2, scan=1.0, loop=2.0),
        row("gru", table="steps", gradient="chunked:10", scan=1.0, loop=0.8, module=0.5),
    ]
    where = "GRU (100, 1, 32, 32)"
    assert verdicts(*rows) == [
        f"missed: steps never slower than the plain loop, by 1 of 4: {where} chunked:10, 1 thread: 0.8x",
        f"missed: steps never slower than JAX's scan, by 1 of 2: {where}, 1 thread: 0.9x",
        "missed: steps >= 10x the plain loop at (100, 1, 32), by 1 of 2: LEAKY (100, 1, 32, 32), 1 thread: 9x",
        "met: steps >= 1.8x the plain loop at (100, 32, 128)",
        "met: steps within 1.25x the layer's time, full",
        f"missed: steps within 1.5x the layer's time, under policies, by 1 of 1: {where} chunked:10, 1 thread: 0.5x",
    ]


def test_markdown_of_steps():
    rows = (
        row("gru", table="steps", scan=0.001, loop=0.012, JAX=0.0011, module=0.0009),
        row("lif", (37, 5, 19, 19), table="steps", scan=0.002, loop=0.004, wrong="loop"),
        row("gru", table="steps", gradient="chunked:10", scan=0.001, loop=0.002, module=0.003, wrong="scan"),
    )
    assert markdown(Results(MACHINE, "auto", rows)).split("\n\n", 1)[1] == (
        "| 1 thread, step | T, B, H | `bptt.scan` | loop, times as long | JAX, times as long | module, times as long "
        "| first call, more |\n"
        "|---|---|---|---|---|---|---|\n"
        "| gru | 100, 1, 32 | 1 ms | 12× | 1.1× | 0.9× | 3 ms |\n"
        "| lif | 37, 5, 19 | 2 ms | wrong |  |  | 6 ms |\n"
        "| gru, `chunked:10` | 100, 1, 32 | wrong | wrong |  | wrong |  |"
    )


def test_short_markdown_of_steps():
    large = (100, 32, 128, 128)
    rows = (
        row("gru", table="steps", scan=0.001, loop=0.012, JAX=0.0011, module=0.0009),
        row("gru", large, table="steps", scan=0.01, loop=0.02, JAX=0.03),
        row("gru", table="steps", gradient="chunked:10", scan=0.001, loop=0.002),
        row("lif", large, table="steps", scan=0.002, loop=0.004, wrong="loop"),
        row("lif", large, table="steps", threads=2, scan=0.001, loop=0.004),
    )
    assert steps_markdown(Results(MACHINE, "auto", rows)) == (
        "a processor, AVX2; torch 2.13.0, JAX 0.10.0; float32, 1 thread, `kernel='auto'`, 2026-01-02. Forward + "
        "backward by `bptt.scan` · the plain loop's time over it · that of JAX's compiled scan; and by how much the "
        "first call takes longer.\n"
        "\n"
        "| step: T, B, H | 100, 1, 32 | 100, 32, 128 | first call |\n"
        "|---|---|---|---|\n"
        "| gru | 1 ms · 12× · 1.1× | 10 ms · 2× · 3× | 30 ms |\n"
        "| lif |  | 2 ms · wrong | 6 ms |"
    )


def test_nothing_measured_is_not_judged():
    assert verdicts() == []
    assert verdicts(row(bptt=1.0, torch_nn=1.0, wrong="bptt")) == []


def test_markdown():
    rows = (
        row("rnn", bptt=0.0012345, torch_nn=0.0024690, JAX=0.00061725, gemm=4e9),
        row("gru", LARGE, bptt=10.0, torch_nn=15.0, JAX=5.0, wrong="JAX", gemm=4e9),
        row("rnn", (9, 1, 3, 4), table="windows", gradient="truncated:4", bptt=1.0, two_loops=123.4),
        row("rnn", threads=2, bptt=1.0, torch_nn=1.0, wrong="bptt"),
    )
    assert markdown(Results(MACHINE, "auto", rows)) == (
        "a processor, AVX2; torch 2.13.0, JAX 0.10.0, NumPy 2.4.0; float32, `kernel='auto'`, 2026-01-02.\n"
        "\n"
        "1 thread, forward + backward: bptt's time · torch.nn's time over it · JAX's time over it · useful FLOP/s as a "
        "share of a 2048 x 2048 x 2048 product's by torch's faster library (4 GFLOP/s).\n"
        "\n"
        "| T, B, I, H | RNN | GRU |\n"
        "|---|---|---|\n"
        "| 100, 1, 32, 32 | 1.23 ms · 2× · 0.5× · 25% |  |\n"
        "| 100, 64, 256, 256 |  | 10000 ms · 1.5× · wrong · 38% |\n"
        "\n"
        "| 1 thread | T, B, I, H | bptt | others, times as long |\n"
        "|---|---|---|---|\n"
        "| truncation, RNN, `truncated:4` | 9, 1, 3, 4 | 1000 ms | two loops 123× |\n"
        "\n"
        "2 threads, forward + backward: bptt's time · torch.nn's time over it · useful FLOP/s as a share of a 2048 x "
        "2048 x 2048 product's by torch's faster library (1 GFLOP/s).\n"
        "\n"
        "| T, B, I, H | RNN |\n"
        "|---|---|\n"
        "| 100, 1, 32, 32 | wrong · wrong |"
    )
