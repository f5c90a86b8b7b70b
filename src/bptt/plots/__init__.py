"""Pictures of what `bptt.flow` measures: each function returns a matplotlib Figure whose title says what to conclude.

No pyplot state is touched: `figure.savefig("map.png")` writes a picture, a notebook shows it without
`%matplotlib inline`, and the measurement itself with its sentence (`html`).
`bptt.plots` needs matplotlib (`pip install 'bptt[plots]'`) and is imported by its own name.
"""

try:
    from ._cell_path import cell_path as cell_path
    from ._comparison import comparison as comparison
    from ._confusion import confusion as confusion
    from ._decay import decay as decay
    from ._eigenvalues import eigenvalues as eigenvalues
    from ._figures import figures as figures
    from ._forecast import forecast as forecast
    from ._gates import gates as gates
    from ._graph import graph as graph
    from ._html import html as html
    from ._jacobians import jacobians as jacobians
    from ._lag_map import lag_map as lag_map
    from ._lyapunov import lyapunov as lyapunov
    from ._products import products as products
    from ._rate_test import rate_test as rate_test
    from ._reach import reach as reach
    from ._shares import shares as shares
    from ._training import training as training
    from ._turning import turning as turning
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in {"matplotlib", "PIL"}:
        raise
    raise ImportError(f"bptt.plots needs {missing}: pip install 'bptt[plots]'") from None
