"""skorch itself: the policy is a parameter like any other, and the nets train by it."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bptt

pytest.importorskip("skorch", reason="needs the extra skorch")
adaptor = pytest.importorskip("bptt.adaptors.skorch", reason="needs the extra skorch", exc_type=ImportError)
sklearn = pytest.importorskip("sklearn.base")
search = pytest.importorskip("sklearn.model_selection")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

T = 12


class Last(nn.Module):
    """The last state, read out."""

    def __init__(self, hidden: int = 3) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def net(kind: Any = adaptor.NeuralNetRegressor, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(Last, train_split=None, verbose=0, max_epochs=2, lr=0.1, iterator_train__shuffle=False, **options)


def data() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((30, T, 2)).astype(np.float32)
    return x, x.sum(axis=(1, 2), keepdims=True)[:, 0].astype(np.float32)


def test_training_is_that_of_the_policy(agree):
    fitted = net(gradient="truncated:3").fit(*data())
    torch.manual_seed(0)
    model = bptt.convert(Last(), "truncated:3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = map(torch.from_numpy, data())
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    agree(fitted.module_.state_dict(), model.state_dict())
    full = net(gradient="full").fit(*data())
    assert not torch.equal(full.module_.rnn.weight_hh_l0, fitted.module_.rnn.weight_hh_l0)


def test_a_grid_search_varies_it():
    grid = {"gradient": ["full", "chunked:4", bptt.Truncated(2)], "module__hidden": [2, 3]}
    found = search.GridSearchCV(net(gradient="full"), grid, cv=2, scoring="neg_mean_squared_error").fit(*data())
    seen = {str(params["gradient"]) for params in found.cv_results_["params"]}
    assert seen == {"full", "chunked:4", "truncated:2"}
    best = found.best_estimator_
    assert str(best.module_.rnn.gradient) == str(found.best_params_["gradient"])
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()


def test_it_is_a_parameter_like_any_other():
    made = net(gradient="chunked:4", memory="states", kernel="eager")
    params = made.get_params()
    assert (params["gradient"], params["memory"], params["kernel"]) == ("chunked:4", "states", "eager")
    again = sklearn.clone(made).initialize()
    layer = again.module_.rnn
    assert (str(layer.gradient), layer.memory, layer.kernel) == ("chunked:4", "states", "eager")
    weights = layer.weight_hh_l0.clone()
    again.set_params(gradient="truncated:2")
    assert str(again.module_.rnn.gradient) == "truncated:2"
    torch.testing.assert_close(again.module_.rnn.weight_hh_l0, weights)
    again.set_params(module__hidden=5)
    assert str(again.module_.rnn.gradient) == "truncated:2"
    assert again.module_.rnn.hidden_size == 5
    loaded = pickle.loads(pickle.dumps(again))
    assert str(loaded.module_.rnn.gradient) == "truncated:2"
    assert type(net().initialize().module_.rnn) is nn.GRU, "None leaves torch's layers"


@pytest.mark.parametrize("name", ["NeuralNet", "NeuralNetClassifier", "NeuralNetBinaryClassifier"])
def test_every_kind_of_net(name):
    options = {"criterion": nn.MSELoss} if name == "NeuralNet" else {}
    made = net(getattr(adaptor, name), gradient="chunked:4", **options).initialize()
    assert str(made.module_.rnn.gradient) == "chunked:4"


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="gradient must be one of"):
        net(gradient="chunk").initialize()
    with pytest.raises(TypeError, match="must hold an RNN, GRU or LSTM"):
        adaptor.NeuralNetRegressor(
            nn.Linear, module__in_features=2, module__out_features=1, gradient="full"
        ).initialize()
    with pytest.raises(ValueError, match="Invalid parameter"):
        net().set_params(gradients="full")
