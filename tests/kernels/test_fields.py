"""The compiled walks as Python sees them: fields by name, and the stub that tells type checkers of them."""

import ast
import re
from pathlib import Path

import pytest

from bptt import kernels
from bptt.kernels import _walks

CLASSES = [f"{walk}Float{bits}" for walk in ("Forward", "Infer", "Sweep", "RowSums", "Program") for bits in (32, 64)]
CLASSES += [f"{walk}Bfloat16" for walk in ("Forward", "Sweep", "RowSums")]
CLASSES += ["ForwardBfloat16Whole", "SweepBfloat16Whole"]


@pytest.mark.parametrize("name", CLASSES)
def test_the_stub_names_the_fields(name: str) -> None:
    stub = ast.parse(Path(kernels.__file__).with_name("_walks.pyi").read_text(encoding="utf-8"))
    (told,) = [
        node for node in stub.body if isinstance(node, ast.ClassDef) and node.name == re.split("Float|Bfloat", name)[0]
    ]
    fields = {ast.unparse(node.target) for node in told.body if isinstance(node, ast.AnnAssign)}
    assert fields == {name for name, value in vars(getattr(_walks, name)).items() if isinstance(value, property)}


@pytest.mark.parametrize("name", CLASSES)
def test_a_field_has_a_name_and_a_type(name: str) -> None:
    walk = getattr(_walks, name)()
    pointer = "code" if name.startswith("Program") else "a" if name.startswith("RowSums") else "x"
    size = "N" if name.startswith("RowSums") else "T"
    setattr(walk, size, 5)
    setattr(walk, pointer, 0)
    with pytest.raises(AttributeError):
        walk.none_of_them = 5
    for field, value in ((size, 2.5), (size, "5"), (pointer, None), (pointer, -1)):
        with pytest.raises(TypeError):
            setattr(walk, field, value)
    with pytest.raises(TypeError):
        walk.run(0, 1)  # which is which?
