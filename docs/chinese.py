"""The generated parts of the Chinese README: the policies, and what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bptt import Adaptive, Chunked, Full, Randomized, Truncated

if TYPE_CHECKING:
    from readme import Gains

__all__ = ["gains", "policy_table"]


def policy_table() -> str:
    """Every policy: how it is written, what it computes, what it costs, its names elsewhere."""
    rows = [
        ("Full()", Full(), "精确梯度", "1", "完全计算"),
        (
            "Chunked(35)",
            Chunked(35),
            "在 k 的每个倍数处切断；各段并排计算",
            "1，只需走 k 步而不是 T 步",
            "每 k 步 `detach()`；`repackage_hidden`；Lightning 1 的 `truncated_bptt_steps`",
        ),
        (
            "Truncated(20)",
            Truncated(20),
            "每个损失都恰好回传 `window` 步",
            "`window`",
            "常规截断；两层循环代码，`bptt_truncate = window - 1`",
        ),
        (
            "Truncated(20, every=5)",
            Truncated(20, every=5),
            "每 5 个损失一起，从其中最后一个起回传 20 步",
            "`window / every`",
            "BPTT(h; h')；TBPTT(k1, k2)，k1 = `every`，k2 = `window`",
        ),
        ("Randomized(0.9)", Randomized(0.9), "每条时间边以概率 p 保留并乘以 1/p：期望上无偏", "1", "随机截断"),
        (
            "Randomized.polynomial(mean=20)",
            Randomized.polynomial(mean=20),
            "同上，未切断的片段长度服从多项式尾",
            "1",
            "anticipated reweighting（ARTBP）",
        ),
        (
            "Adaptive(0.5, 64)",
            Adaptive(0.5, 64),
            "测得的相对偏差不超过 0.5 的最小窗口，至多 64 步；由 `bptt.flow.adapt` 测量",
            "`window`，外加测量",
            "自适应截断（Aicher、Foti、Fox 2019）",
        ),
    ]
    lines = ["| 策略 | 文本形式 | 计算什么 | 相对于 `full` 的计算量 | 别处的名字 |", "|---|---|---|---|---|"]
    lines += [f"| `{code}` | `{policy}` | {what} | {work} | {names} |" for code, policy, what, work, names in rows]
    return "\n".join(lines)


def gains(measured: Gains) -> str:
    """What the package gives, in four bullets, with the numbers that were measured on one thread."""
    rnn, gru, lstm = (" 至 ".join(measured.by_cell[cell]) for cell in ("rnn", "gru", "lstm"))
    count, one, last = measured.sizes
    loops = "；".join(
        f"({shape}) 时 {mid} 倍（{least} 至 {most}）" for shape, (mid, least, most) in measured.loops.items()
    )
    machine = measured.machine
    bullets = (
        "**接口不变，在 CPU 上大多更快。** 前向加反向，torch.nn 的层所用时间是 bptt 的 "
        f"{rnn} 倍（RNN）、{gru} 倍（GRU）、{lstm} 倍（LSTM），"
        f"共 {count} 种尺寸，(T, B, I, H) 从 ({one}) 到 ({last})。",
        "**要什么梯度，就精确地给什么梯度。** "
        "完全计算、分段截断、逐损失截断、无偏的随机截断；多层、双向、变长序列、状态重置都一样。"
        "每个核都与 NumPy 写成的公式及自动微分一致，float64 下误差不超过 1e-10。",
        f"**自己写的单元，编译执行。** {measured.cells} 种常见的自定义单元，"
        f"逐步循环所用时间与 bptt 之比的中位数（及最小、最大值）为：(T, B, H) 为 {loops}。",
        "**看得见梯度去了哪里。** 每个损失回传多远，每种策略丢掉了什么，第一个 NaN 出自哪一步："
        "用普通的话下结论，附报告与图。",
    )
    told = "\n".join(f"- {bullet}" for bullet in bullets)
    where = f"{machine.processor}（{machine.instructions}）单线程，float32，torch {machine.torch}"
    return f"{told}\n\n测量环境：{where}；[全部数据](docs/speed.md)。"
