"""Inference of a trained model where it is deployed: outputs in the place of losses."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import bptt

from .training import Row, Tagger, batches, folder


def onnx_runtime(cell: str, ours: bool, steps: int) -> list[float]:
    """Ours as it is, without gradients, and the ONNX model that it gives."""
    run = _model(cell) if ours else _onnx(cell)
    return [float(run(x).square().mean()) for x, _ in batches(steps)]


def inductor(cell: str, ours: bool, steps: int) -> list[float]:
    """AOTInductor packages of torch's layer and of ours."""
    run = _package(cell, ours)
    return [float(run(x).square().mean()) for x, _ in batches(steps)]


@functools.cache
def _model(cell: str) -> Callable[[Tensor], Tensor]:
    return torch.no_grad()(bptt.convert(Tagger(cell)).eval())


@functools.cache
def _onnx(cell: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with folder() as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = bptt.convert(Tagger(cell)).eval()
        torch.onnx.export(model, (batches(1)[0][0],), f"{path}/model.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(f"{path}/model.onnx", options)
    (given,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


@functools.cache
def _package(cell: str, ours: bool) -> Callable[[Tensor], Tensor]:
    model = Tagger(cell).eval()
    with torch.no_grad(), folder() as path:
        program = torch.export.export(bptt.convert(model) if ours else model, (batches(1)[0][0],))
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{path}/model.pt2")
        return torch._inductor.aoti_load_package(package)


ROWS = [
    Row(
        f"{name}, {cell}",
        package,
        needs,
        what,
        partial(run, cell),
    )
    for name, package, needs, what, run in (
        (
            "ONNX Runtime",
            "onnxruntime",
            ("onnxruntime", "onnx", "onnxscript"),
            "inference of the model that ours exports, against ours under no_grad",
            onnx_runtime,
        ),
        ("AOTInductor", "torch", ("torch",), "inference, packages of torch's layer and of ours", inductor),
    )
    for cell in ("LSTM", "GRU")
]
