"""All pictures of a survey."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from ..flow import LagMap, Lags, Survey
from ._decay import decay
from ._html import DRAWN
from ._lag_map import lag_map
from ._training import training

__all__ = ["figures"]


def figures(survey: Survey) -> Iterator[tuple[str, Figure]]:
    """(name, picture) of everything a survey holds; of each layer its own (t, lag) map.

    >>> import torch, bptt, bptt.plots
    >>> found = bptt.flow.survey(bptt.nn.RNN(2, 3), torch.randn(8, 2, 2), policies=[])
    >>> [name for name, _ in bptt.plots.figures(found)]
    ['lag_map', 'decay', 'shares', 'jacobians', 'products', 'eigenvalues', 'lyapunov', 'gates']
    """
    for measure in filter(None, survey.measures):  # records may be an empty list
        if isinstance(measure, LagMap):
            for i, layer in enumerate(measure.layers):
                only = len(measure.layers) == 1
                yield "lag_map" if only else f"lag_map_{layer.replace(' ', '_')}", lag_map(measure, layer=i)
        elif isinstance(measure, Lags):
            bounded = survey.products is not None and survey.products.beta_w is not None and len(measure.layers) == 1
            yield "decay", decay(measure, bound=survey.products if bounded else None)
        elif measure is survey.records:
            yield "training", training(measure)
        else:
            draw = DRAWN[type(measure)]
            yield draw.__name__, draw(measure)
