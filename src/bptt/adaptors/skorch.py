"""skorch: its nets with the gradient policy as a parameter, which a search can vary.

`GridSearchCV(NeuralNetRegressor(Module, gradient="full"), {"gradient": ["full", "chunked:35", "truncated:35/5"]})`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import policies
from ..memory import Checkpoints
from ..nn import convert
from .missing import missing

if TYPE_CHECKING:
    import skorch
else:
    try:
        import skorch
    except ModuleNotFoundError as error:
        raise missing("skorch", ("skorch",), error) from None

__all__ = ["NeuralNet", "NeuralNetBinaryClassifier", "NeuralNetClassifier", "NeuralNetRegressor", "WithPolicy"]

_OWN = ("gradient", "memory", "kernel")


class WithPolicy:
    """What any net of skorch gets, where this class stands before it: the parameters gradient, memory and kernel.

    They are those of `bptt.convert`, which is called for the module as soon as skorch has made it; None leaves the
    settings that its layers have. `set_params` of a net that is initialised sets them at once, on the weights that it
    has. They are parameters like any other: `get_params`, `sklearn.base.clone`, a search and pickles keep them.

    Raises TypeError for a module without a recurrent layer, where one of the three is given, and ValueError for an
    unknown policy, memory or kernel: when the net is initialised.
    """

    module_: Any

    def __init__(
        self,
        *args: Any,
        gradient: str | policies.Policy | None = None,
        memory: str | Checkpoints | None = None,
        kernel: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.gradient, self.memory, self.kernel = gradient, memory, kernel

    def initialize_module(self) -> Any:
        """skorch's method: make the module, and convert it."""
        super().initialize_module()  # type: ignore[misc]  # of the class that it is mixed with
        self.module_ = self._converted(self.module_)
        return self

    def set_params(self, **kwargs: Any) -> Any:
        """skorch's method: set parameters, of layers that exist too."""
        super().set_params(**kwargs)  # type: ignore[misc]  # of the class that it is mixed with
        if self.initialized_ and any(name in kwargs for name in _OWN):  # type: ignore[attr-defined]  # of the class that it is mixed with
            self._converted(self.module_)
        return self

    def _converted(self, module: Any) -> Any:
        settings = {name: getattr(self, name) for name in _OWN}
        return module if set(settings.values()) == {None} else convert(module, strict=True, **settings)


class NeuralNet(WithPolicy, skorch.NeuralNet):
    """skorch.NeuralNet with `gradient`, `memory` and `kernel` (see `WithPolicy`)."""


class NeuralNetClassifier(WithPolicy, skorch.NeuralNetClassifier):
    """skorch.NeuralNetClassifier with `gradient`, `memory` and `kernel` (see `WithPolicy`)."""


class NeuralNetBinaryClassifier(WithPolicy, skorch.NeuralNetBinaryClassifier):
    """skorch.NeuralNetBinaryClassifier with `gradient`, `memory` and `kernel` (see `WithPolicy`)."""


class NeuralNetRegressor(WithPolicy, skorch.NeuralNetRegressor):
    """skorch.NeuralNetRegressor with `gradient`, `memory` and `kernel` (see `WithPolicy`)."""
