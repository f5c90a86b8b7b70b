"""Recurrent steps that people write, from their papers' equations: what `bptt bench steps` times, and tests try.

`cell` is a row; `gated`, `dynamics` and `memory` have the steps; `jax_steps` the same in JAX.
"""

from . import dynamics, gated, memory
from .cell import StepCell as StepCell
from .cell import StepProblem as StepProblem
from .cell import over_time as over_time
from .jax_steps import JAX_STEPS as JAX_STEPS
from .jax_steps import jax_scan as jax_scan

__all__ = ["JAX_STEPS", "STEP_CELLS", "StepCell", "StepProblem", "jax_scan", "over_time"]

STEP_CELLS: dict[str, StepCell] = {
    cell.name: cell
    for cell in (
        StepCell("lstm", gated.lstm, "Hochreiter and Schmidhuber 1997", layer="lstm"),
        StepCell("gru", gated.gru, "Cho et al. 2014", layer="gru"),
        StepCell("layer-norm-lstm", gated.layer_norm_lstm, "Ba, Kiros and Hinton 2016"),
        StepCell("leaky", dynamics.leaky, "Jaeger et al. 2007"),
        StepCell("lif", dynamics.lif, "Neftci et al. 2019", distance=dynamics.distance_from_threshold),
        StepCell("slstm", gated.slstm, "Beck et al. 2024"),
        StepCell("cornn", dynamics.cornn, "Rusch and Mishra 2021"),
        StepCell("lem", dynamics.lem, "Rusch et al. 2022"),
        StepCell("peephole-lstm", gated.peephole_lstm, "Gers and Schmidhuber 2000"),
        StepCell("attention", memory.attention, "Luong, Pham and Manning 2015"),
        StepCell("conv-lstm", gated.conv_lstm, "Shi et al. 2015"),
        StepCell("rk4", dynamics.rk4, "Chen et al. 2018"),
        StepCell("ltc", dynamics.ltc, "Hasani et al. 2021"),
        StepCell("selective", memory.selective, "Gu and Dao 2023"),
        StepCell("gated-delta", memory.gated_delta, "Yang, Kautz and Hatamizadeh 2024"),
        StepCell("kalman", memory.kalman, "Kalman 1960"),
        StepCell("world-model", memory.world_model, "Hafner et al. 2019"),
    )
}
"""By name: the seven that most people write, then ten of other kinds."""
