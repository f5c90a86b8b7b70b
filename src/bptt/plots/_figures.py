"""All pictures of a survey."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from ..flow import Survey
from ._cell_path import cell_path
from ._comparison import comparison
from ._decay import decay
from ._eigenvalues import eigenvalues
from ._gates import gates
from ._jacobians import jacobians
from ._lag_map import lag_map
from ._lyapunov import lyapunov
from ._products import products
from ._shares import shares
from ._training import training

__all__ = ["figures"]

OF_ONE = (jacobians, products, lyapunov, cell_path, gates, comparison)
"""The pictures of one measurement each, by its name in a survey."""


def figures(survey: Survey) -> Iterator[tuple[str, Figure]]:
    """(name, picture) of everything a survey holds; of each layer its own (t, lag) map.

    >>> import torch, bptt, bptt.plots
    >>> found = bptt.flow.survey(bptt.nn.RNN(2, 3), torch.randn(8, 2, 2), policies=[])
    >>> [name for name, _ in bptt.plots.figures(found)]
    ['lag_map', 'decay', 'shares', 'eigenvalues', 'jacobians', 'products', 'lyapunov', 'gates']
    """
    if survey.lag_map is not None:
        for i, layer in enumerate(survey.lag_map.layers):
            only = len(survey.lag_map.layers) == 1
            yield "lag_map" if only else f"lag_map_{layer.replace(' ', '_')}", lag_map(survey.lag_map, layer=i)
    if survey.lags is not None:
        bounded = survey.products is not None and survey.products.beta_w is not None and len(survey.lags.layers) == 1
        yield "decay", decay(survey.lags, bound=survey.products if bounded else None)
    if survey.shares is not None:
        yield "shares", shares(survey.shares)
    if survey.spectrum is not None:
        yield "eigenvalues", eigenvalues(survey.spectrum)
    for picture in OF_ONE:
        measure = getattr(survey, picture.__name__)
        if measure is not None:
            yield picture.__name__, picture(measure)
    if survey.records:
        yield "training", training(survey.records)
