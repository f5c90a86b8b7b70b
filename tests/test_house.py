"""The house rules: which way imports point, what is private, who tells cells apart, names and sizes of files."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

import bptt
from bptt.cells import CELLS
from bptt.nn import LAYERS

PACKAGE = Path(bptt.__file__).parent

ORDER = [
    ["loading"],
    ["equations"],
    ["cells"],
    ["policies", "memory", "schedules"],
    ["steps"],
    ["kernels"],
    ["engine"],
    ["clock"],
    ["scan"],
    ["nn"],
    ["flow"],
    ["plots"],
    ["report"],
    ["train"],
    ["adaptors"],
    ["bench"],
    ["cli"],
]
"""Reading order. A module imports from its own folder, or from what stands before it."""

RANK = {unit: rank for rank, units in enumerate(ORDER) for unit in units}

PARTS = {"__main__": "cli"}
"""Top-level files that belong to another one."""

TREES = {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in PACKAGE.rglob("*.py")}

FILES = sorted(TREES)


def unit_of(name: str) -> str:
    return PARTS.get(name, name)


def unit_of_file(path: str) -> str:
    return unit_of(Path(path).parts[0].removesuffix(".py"))


def imports(path: str, passed_on: bool = True) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, relative ones made absolute; name is "" for `import module`.

    passed_on: with `import name as name` too, which gives the name to whoever imports this file.
    """
    package = ["bptt", *Path(path).parent.parts]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                if passed_on or alias.asname != alias.name:
                    yield module, alias.name


def told(found: Mapping[str, Iterable[str]]) -> str:
    """Every file with all that is wrong in it, which pytest would abridge."""
    return "\n".join(f"{path}: {', '.join(sorted(names))}" for path, names in sorted(found.items()))


FACE = {name: module.split(".")[1] for module, name in imports("__init__.py") if module.count(".") >= 1}
"""Where each public name lives."""


def units_imported(path: str) -> set[str]:
    """The units of the package a file imports from."""
    found = set()
    for module, name in imports(path):
        parts = module.split(".")
        if parts[0] != "bptt":
            continue
        inner = parts[1] if len(parts) > 1 else name
        if len(parts) == 1 and inner in FACE and inner not in RANK:
            inner = FACE[inner]
        if inner and not (inner.startswith("__") and inner.endswith("__") and inner != "__main__"):
            found.add(unit_of(inner))
    return found


def roots_imported(path: str) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(path)}


def test_imports_point_one_way() -> None:
    wrong = {}
    for path in FILES:
        unit = unit_of_file(path)
        if unit == "__init__":
            allowed = set(RANK)
        else:
            allowed = {other for other in RANK if other == unit or RANK[other] < RANK.get(unit, 0)}
        wrong[path] = units_imported(path) - allowed
    assert {path: units for path, units in wrong.items() if units} == {}


def test_equations_are_numpy_only() -> None:
    allowed = {"numpy", "bptt", *sys.stdlib_module_names}
    assert {
        p: roots_imported(p) - allowed for p in FILES if p.startswith("equations/") and not roots_imported(p) <= allowed
    } == {}


def test_policies_and_memory_are_data() -> None:
    data = {"policies", "memory", "schedules"}
    paths = [path for path in FILES if unit_of_file(path) in data]
    assert {path: units_imported(path) - data for path in paths if units_imported(path) - data} == {}


@pytest.mark.parametrize(("room", "library"), [("plots", "matplotlib"), ("report", "plotly")])
def test_only_one_room_imports_it(room: str, library: str) -> None:
    importers = {path for path in FILES if library in roots_imported(path)}
    assert {path.split("/")[0] for path in importers} == {room}, sorted(importers)


FRAMEWORKS = {
    "accelerate": {"accelerate"},
    "ignite": {"ignite"},
    "lightning": {"lightning", "pytorch_lightning"},
    "opacus": {"opacus"},
    "sb3_contrib": {"sb3_contrib", "stable_baselines3", "gymnasium"},
    "skorch": {"skorch", "sklearn"},
    "torchrl": {"torchrl", "tensordict"},
    "transformers": {"transformers"},
}
"""The adaptors, and the packages that each of them alone imports."""


def test_one_adaptor_for_each_framework() -> None:
    wrong: dict[str, set[str]] = {}
    for path in FILES:
        own = FRAMEWORKS.get(Path(path).stem, set()) if path.startswith("adaptors/") else set()
        if foreign := roots_imported(path) & (set().union(*FRAMEWORKS.values()) - own):
            wrong[path] = foreign
    assert not wrong, told(wrong)
    assert all(roots_imported(f"adaptors/{name}.py") & packages for name, packages in FRAMEWORKS.items())


def test_the_reading_order_is_the_one_in_use() -> None:
    """Every folder and file of the package has its place, and the rule above has something to check."""
    units = {unit_of_file(f) for f in FILES} - {"__init__"}
    assert units <= set(RANK)
    assert {"policies", "kernels", "engine"} <= set().union(*map(units_imported, FILES))


def test_file_names_say_something() -> None:
    nothing = {"utils", "util", "misc", "common", "helpers", "helper", "tools", "stuff"}
    assert [f for f in FILES if nothing & {part.removesuffix(".py").strip("_") for part in Path(f).parts}] == []


# No circles, nothing private

TORCHS = {*dir(torch.Tensor), *dir(torch.nn.RNN(1, 1))}
"""Names of torch's, which a class of ours may have too."""


def defined(path: str) -> set[str]:
    """Names that a file gives a meaning of its own, at any depth."""
    return {
        node.id if isinstance(node, ast.Name) else node.name
        for node in ast.walk(TREES[path])
        if (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        or isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def target(module: str, name: str) -> str | None:
    """The file of the package that an import reads, through what `__init__` files pass on; None for any other."""
    if module.split(".")[0] != "bptt":
        return None
    base = "/".join(module.split(".")[1:])
    inside = f"{base}/{name}".strip("/") if name else base
    for path in (f"{inside}.py", f"{inside}/__init__.py"):
        if path in TREES:
            return path
    if f"{base}.py" in TREES:
        return f"{base}.py"
    face = f"{base}/__init__.py".strip("/")
    for passed_module, passed in imports(face):
        if passed == name:
            return target(passed_module, passed)
    return face if name in defined(face) else None  # else an extension module


def imported_files(path: str) -> set[str]:
    """The files that a file imports, for types alone or not; what an `__init__` passes on is no import of its own."""
    found = {target(module, name) for module, name in imports(path, passed_on=Path(path).name != "__init__.py")}
    return {other for other in found if other is not None and other != path}


def test_no_two_files_import_each_other() -> None:
    graph = {path: imported_files(path) for path in FILES}

    def reached(path: str) -> set[str]:
        seen, ahead = set(), [path]
        while ahead:
            ahead += graph[new := ahead.pop()] - seen
            seen |= graph[new]
        return seen

    reach = {path: reached(path) for path in FILES}
    circles = {tuple(sorted({b for b in reach[a] if a in reach[b]})) for a in FILES if a in reach[a]}
    assert not circles, "\n".join(map(", ".join, sorted(circles)))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_no_private_module_or_name_of_another_room() -> None:
    wrong: dict[str, set[str]] = {}
    for path in FILES:
        for module, name in imports(path):
            parts = module.split(".")
            own = parts[0] != "bptt" or unit_of_file(path) == (parts[1] if len(parts) > 1 else "__init__")
            if not own and any(map(is_private, (*parts, name))):
                wrong.setdefault(path, set()).add(f"{module}: {name}")
    assert not wrong, told(wrong)


def private_members(tree: ast.AST) -> set[str]:
    """Private methods and attributes of the classes of a file."""
    found = set()
    for owner in ast.walk(tree):
        if isinstance(owner, ast.ClassDef):
            for node in ast.walk(owner):
                if isinstance(node, ast.FunctionDef):
                    found.add(node.name)
                elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in found if is_private(name)}


def test_no_private_member_of_another_room() -> None:
    """None is read that only another room's classes have, and none is overridden."""
    own: dict[str, set[str]] = {}
    for path in FILES:
        own.setdefault(unit_of_file(path), set()).update(private_members(TREES[path]))
    wrong: dict[str, set[str]] = {}
    for path in FILES:
        unit = unit_of_file(path)
        others = set().union(*(names for room, names in own.items() if room != unit)) - own[unit] - TORCHS
        sources = {name: target(module, name) for module, name in imports(path)}
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Attribute) and node.attr in others:
                wrong.setdefault(path, set()).add(node.attr)
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    source = sources.get(base.id) if isinstance(base, ast.Name) else None
                    if source is not None and unit_of_file(source) != unit:
                        both = private_members(node) & private_members(TREES[source])
                        wrong.setdefault(path, set()).update(f"{node.name}.{name}" for name in both)
    wrong = {path: names for path, names in wrong.items() if names}
    assert not wrong, told(wrong)


# One registry of cells

KNOWN = {mode: cell for mode, cell in CELLS.items() if type(cell).__module__.startswith("bptt.")}

NAMES = {*KNOWN, *(cell.name for cell in KNOWN.values()), *(LAYERS[cell.name].__name__ for cell in KNOWN.values())}

TELL_CELLS_APART = {
    "adaptors/torchrl.py": "the attributes of TorchRL's modules that hold their layer",
    "cells/": "what is true of each",
    "equations/": "the oracles, which know nothing of the package",
    "nn/layers.py": "the layers, and the modes that torch.nn.RNNBase knows",
    "kernels/compiled_forward.py": "the walks' numbers in csrc",
    "kernels/torch_layers.py": "torch's own functions",
    "kernels/__init__.py": "torch's own functions",
    "train/config.py": "a default",
    "train/options.py": "the layers' names, for help without torch",
    "bench/jax_layers.py": "JAX's layers",
    "bench/reach.py": "the speeds to reach",
    "bench/tables.py": "the cases of each table",
    "bench/step_cells/": "steps that are an LSTM's and a GRU's, written out",
    "cli/bench_options.py": "the steps' names, for help without torch",
    "bench/steps.py": "a step that is an LSTM's, written out, and which steps are timed under policies",
    "bench/windows.py": "two loops of an RNN, written out",
    "cli/audit.py": "somebody's layer, which only its shapes tell",
    "cli/comparison.py": "which layers of which arguments are checked",
    "cli/demo.py": "the net of the demonstration",
}
"""The files that may, and what of them. What a function's argument is by default tells nothing apart."""


def counts_gates(node: ast.AST) -> bool:
    """Whether a number of gates is compared with a number, or looked up."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return any(isinstance(side, ast.Constant) for side in sides) and any(map(is_number_of_gates, sides))
    if isinstance(node, ast.Dict | ast.DictComp):
        return any(map(is_number_of_gates, node.keys if isinstance(node, ast.Dict) else [node.key]))
    return isinstance(node, ast.Subscript) and is_number_of_gates(node.slice)


def is_number_of_gates(node: ast.AST | None) -> bool:
    text = "" if node is None else ast.unparse(node)
    return text.endswith(".gates_per_unit") or (text.startswith("len(") and text.endswith(".gate_names)"))


def passed_over(tree: ast.AST) -> Iterator[ast.AST]:
    """What names a cell without telling it apart: `__all__`, and defaults of arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            yield from [*node.defaults, *filter(None, node.kw_defaults)]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            yield from ast.walk(node.value)


def test_one_registry_of_cells() -> None:
    """Nobody else keeps a table of cells, or knows one by its name, its mode or its number of gates."""
    found: dict[str, set[str]] = {}
    for path, tree in TREES.items():
        others = set(passed_over(tree))
        place = next((place for place in TELL_CELLS_APART if path.startswith(place)), path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in NAMES and node not in others:
                found.setdefault(place, set()).add(node.value)
            elif counts_gates(node):
                found.setdefault(place, set()).add(ast.unparse(node))
    wrong = {place: names for place, names in found.items() if place not in TELL_CELLS_APART}
    assert not wrong, told(wrong)
    assert set(found) == set(TELL_CELLS_APART), "no longer needed"


# What a checker is told to pass over

IGNORED = re.compile(r"# type: ignore(?!\[[a-z, -]+\]  # \S)")


def test_every_ignored_type_says_why() -> None:
    wrong = {path: IGNORED.findall((PACKAGE / path).read_text(encoding="utf-8")) for path in FILES}
    lines = {path: {f"{len(found)} without code or reason"} for path, found in wrong.items() if found}
    assert not lines, told(lines)


# Size

MOST = 400
"""Lines of a file, which one reads at a time."""


def test_files_are_short() -> None:
    tests = Path(__file__).parent
    folders = ((PACKAGE, ("*.py", "*.pyi")), (tests, ("*.py",)), (tests.parent / "csrc", ("*.hpp", "*.cpp")))
    sizes = {
        f"{folder.name}/{path.relative_to(folder).as_posix()}": len(path.read_text(encoding="utf-8").splitlines())
        for folder, patterns in folders
        for pattern in patterns
        for path in folder.rglob(pattern)
    }
    assert "csrc/module.cpp" in sizes
    assert not (long := {path: {str(lines)} for path, lines in sizes.items() if lines >= MOST}), told(long)
