"""sb3-contrib itself: the policies give the numbers of its own, train alike, and survive saving and loading."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bptt

theirs = pytest.importorskip("sb3_contrib", reason="needs the extra sb3-contrib")
adaptor = pytest.importorskip("bptt.adaptors.sb3_contrib", reason="needs the extra sb3-contrib", exc_type=ImportError)
gym = pytest.importorskip("gymnasium")
vectors = pytest.importorskip("stable_baselines3.common.vec_env")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STEPS, ENVS = 24, 2
OPTIONS = {"n_steps": STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}


class Short(gym.Env):
    """Episodes of a few steps, so that many start within a rollout."""

    def __init__(self, space: str = "box") -> None:
        box = gym.spaces.Box(-1, 1, (3,), np.float32)
        image = gym.spaces.Box(0, 255, (1, 36, 36), np.uint8)
        self.observation_space = {"box": box, "image": image, "dict": gym.spaces.Dict({"a": box, "b": box})}[space]
        self.action_space = gym.spaces.Discrete(2)

    def seen(self) -> Any:
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.observation_space.seed(seed or 0)
        self.t = 0
        return self.seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        return self.seen(), float(action), self.t >= 5, False, {}


def agent(policy: Any, space: str = "box", **kwargs: Any) -> Any:
    kwargs = {"lstm_hidden_size": 6, "net_arch": [4], **kwargs}
    return theirs.RecurrentPPO(
        policy, vectors.DummyVecEnv([lambda: Short(space)] * ENVS), policy_kwargs=kwargs, **OPTIONS
    )


@pytest.mark.parametrize("critic", ["own", "shared", "none"])
def test_outputs_and_gradients_are_theirs(agree, critic):
    how = {"own": {}, "none": {"enable_critic_lstm": False}}
    how["shared"] = {"shared_lstm": True, "enable_critic_lstm": False}
    ours = agent(adaptor.MlpLstmPolicy, n_lstm_layers=2, **how[critic]).policy
    other = agent("MlpLstmPolicy", n_lstm_layers=2, **how[critic]).policy
    other.load_state_dict(ours.state_dict())
    assert type(ours.lstm_actor) is bptt.nn.LSTM
    torch.manual_seed(3)
    n, T = 3, 9
    obs, actions = torch.randn(n * T, 3), torch.randint(2, (n * T,))
    pair = tuple(torch.randn(2, n, 6) for _ in range(2))
    states = theirs.common.recurrent.type_aliases.RNNStates(pair, pair)
    for starts in (torch.zeros(n * T), (torch.rand(n * T) < 0.3).float(), torch.ones(n * T)):
        results = []
        for policy in (ours, other):
            policy.zero_grad()
            out = policy.evaluate_actions(obs, actions, states, starts)
            sum(part.sum() for part in out).backward()
            results.append([*out, *(p.grad for p in policy.parameters() if p.grad is not None)])
        agree(*results)


def test_an_agent_learns_as_theirs():
    options = {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}}
    ours, other = agent(adaptor.MlpLstmPolicy, **options), agent("MlpLstmPolicy", **options)
    other.policy.load_state_dict(ours.policy.state_dict())
    for one in (ours, other):
        torch.manual_seed(4)
        np.random.seed(4)  # stable_baselines3 draws from it
        one.learn(2 * STEPS * ENVS)
    torch.testing.assert_close(ours.policy.state_dict(), other.policy.state_dict(), rtol=1e-4, atol=1e-6)


def test_a_policy_of_gradients_changes_the_gradients():
    full, cut = agent(adaptor.MlpLstmPolicy), agent(adaptor.MlpLstmPolicy, gradient="chunked:1")
    torch.testing.assert_close(full.policy.state_dict(), cut.policy.state_dict())
    for one in (full, cut):
        torch.manual_seed(4)
        one.learn(STEPS * ENVS)
    assert not torch.equal(full.policy.lstm_actor.weight_hh_l0, cut.policy.lstm_actor.weight_hh_l0)


@pytest.mark.parametrize(("name", "space"), [("CnnLstmPolicy", "image"), ("MultiInputLstmPolicy", "dict")])
def test_every_policy_learns(name, space):
    one = agent(getattr(adaptor, name), space, gradient=bptt.Truncated(4))
    one.learn(STEPS * ENVS)
    assert str(one.policy.lstm_critic.gradient) == "truncated:4"


def test_agents_are_saved_and_loaded(tmp_path: Path):
    one = agent(adaptor.MlpLstmPolicy, gradient="chunked:8", memory="states")
    one.learn(STEPS * ENVS)
    one.save(tmp_path / "agent")
    again = theirs.RecurrentPPO.load(tmp_path / "agent", device="cpu")
    for layer in (again.policy.lstm_actor, again.policy.lstm_critic):
        assert (type(layer), str(layer.gradient), layer.memory) == (bptt.nn.LSTM, "chunked:8", "states")
    torch.testing.assert_close(again.policy.state_dict(), one.policy.state_dict())
    seen = np.zeros((2, 3), np.float32)
    action, state = again.predict(seen, deterministic=True)
    again.predict(seen, state, episode_start=np.array([True, False]), deterministic=True)
    np.testing.assert_array_equal(action, one.predict(seen, deterministic=True)[0])
    again.set_env(one.get_env())
    again.learn(STEPS * ENVS)


def test_a_policy_alone_is_saved_and_loaded(tmp_path: Path):
    one = agent(adaptor.MlpLstmPolicy, gradient="chunked:8", n_lstm_layers=2).policy
    one.save(tmp_path / "policy.pt")
    again = adaptor.MlpLstmPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert (str(again.lstm_actor.gradient), again.lstm_actor.num_layers) == ("chunked:8", 2)
    torch.testing.assert_close(again.state_dict(), one.state_dict())


def test_a_model_of_theirs_loads_into_ours(tmp_path: Path):
    other = agent("MlpLstmPolicy")
    other.learn(STEPS * ENVS)
    other.save(tmp_path / "theirs")
    ours = theirs.RecurrentPPO.load(
        tmp_path / "theirs", device="cpu", custom_objects={"policy_class": adaptor.MlpLstmPolicy}
    )
    assert type(ours.policy.lstm_actor) is bptt.nn.LSTM
    torch.testing.assert_close(ours.policy.state_dict(), other.policy.state_dict())


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="gradient must be one of"):
        agent(adaptor.MlpLstmPolicy, gradient="chunk")
