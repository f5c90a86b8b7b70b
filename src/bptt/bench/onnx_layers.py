"""The same layers in ONNX Runtime, for inference: one operator of ONNX over all steps.

Gates in the order of the ONNX operators, which the cells know, biases side by side.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cells import of_name
from ..train.extras import require
from .contest import Call

__all__ = ["onnx_call", "onnx_installed"]


def onnx_installed() -> bool:
    """Whether ONNX Runtime is, and what makes its models."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnxruntime", "onnx"))


def onnx_call(cell: str, weights: Mapping[str, Tensor], x: Tensor, hx: Sequence[Tensor]) -> Call:
    """One forward pass on as many threads as torch has: y `[T, B, H]`, then the final state, each `[1, B, H]`.

    cell: "rnn", "gru" or "lstm". weights: torch.nn's state_dict of one layer. x: `[T, B, I]`. hx: h, or h and c.
    Raises InputError where ONNX Runtime or onnx is not installed.
    """
    runtime, onnx = require("onnxruntime", "bench"), require("onnx", "bench")
    helper, numpy_helper = require("onnx.helper", "bench"), require("onnx.numpy_helper", "bench")
    W, R, *biases = (_ordered(cell, w.detach().numpy()) for w in weights.values())
    H = R.shape[-1]
    constants = {"W": W[None], "R": R[None], "Bias": np.concatenate(biases)[None]}
    given = {"x": x.numpy(), **dict(zip(("h", "c"), (state.numpy() for state in hx), strict=False))}
    outputs = ("y", "h_n", "c_n")[: 1 + len(hx)]
    known = of_name(cell)
    node = helper.make_node(
        known.onnx,
        ["x", "W", "R", "Bias", "", *list(given)[1:]],
        ["y_all", *outputs[1:]],
        hidden_size=H,
        **known.onnx_attributes,
    )
    squeeze = helper.make_node("Squeeze", ["y_all", "axis"], ["y"])
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node, squeeze],
        "layer",
        [helper.make_tensor_value_info(name, kind, value.shape) for name, value in given.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()]
        + [numpy_helper.from_array(np.array([1]), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    held = runtime.SessionOptions()
    held.intra_op_num_threads = torch.get_num_threads()
    held.inter_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), held, providers=["CPUExecutionProvider"])

    def call() -> Sequence[Any]:
        done: Sequence[Any] = session.run(outputs, given)
        return done

    return call


def _ordered(cell: str, w: Any) -> Any:
    """Rows `[G H, ...]` with the gates in ONNX's order."""
    known = of_name(cell)
    gates = np.split(w, known.gates_per_unit)
    return np.concatenate([gates[known.gate_names.index(name)] for name in known.onnx_gates])
