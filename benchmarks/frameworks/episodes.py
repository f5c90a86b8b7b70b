"""Reinforcement learning: sequences in which episodes start."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from .training import Row

UNITS = 64
ENVIRONMENTS, ROLLOUT, FEATURES = 8, 128, 64


def sb3_contrib(ours: bool, steps: int) -> list[float]:
    """RecurrentPPO on CartPole: the entropy, value and policy losses of every update of the agent."""
    import gymnasium
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    from bptt.adaptors.sb3_contrib import MlpLstmPolicy

    torch.manual_seed(0)
    np.random.seed(0)
    environments = DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * ENVIRONMENTS)
    agent = RecurrentPPO(
        MlpLstmPolicy if ours else "MlpLstmPolicy",
        environments,
        n_steps=ROLLOUT,
        batch_size=ROLLOUT,
        n_epochs=2,
        seed=0,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": UNITS},
    )
    found: list[float] = []
    train = agent.train

    def trained() -> None:
        train()
        found.extend(agent.logger.name_to_value[f"train/{name}"] for name in ("entropy_loss", "value_loss", "loss"))

    agent.train = trained
    agent.learn(max(steps // 16, 1) * ROLLOUT * ENVIRONMENTS)
    return found


def torchrl(kind: str, ours: bool, steps: int) -> list[float]:
    """A regression on trajectories with stored states; TorchRL's module with its "pad"."""
    from tensordict import TensorDict
    from torchrl import modules

    from bptt.adaptors import torchrl as adaptor

    states = ["h", "c"] if kind == "LSTM" else ["h"]
    keys = {"in_keys": ["x", *states], "out_keys": ["y", *(("next", s) for s in states)]}
    torch.manual_seed(0)
    module = getattr(adaptor if ours else modules, f"{kind}Module")(FEATURES, UNITS, **keys)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    B, T, found = 16, ROLLOUT, []
    for _ in range(steps):
        held: dict[str, Any] = {"x": normal(B, T, FEATURES), "is_init": torch.rand(B, T, 1, generator=generator) < 0.05}
        held |= {name: 0.1 * normal(B, T, 1, UNITS) for name in states}
        with modules.set_recurrent_mode(True):
            y = module(TensorDict(held, [B, T]))["y"]
        loss = (y.mean(-1) - held["x"][..., 0].cumsum(1) / T**0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return found


ROWS = [
    Row(
        "sb3-contrib, LSTM",
        "sb3-contrib",
        ("sb3_contrib", "gymnasium"),
        f"RecurrentPPO.learn on CartPole, {ENVIRONMENTS} environments of {ROLLOUT} steps, rollouts included",
        sb3_contrib,
    ),
    *[
        Row(
            f"TorchRL, {kind}",
            "torchrl",
            ("torchrl", "tensordict"),
            f"{kind}Module, 16 rows of {ROLLOUT} steps, 5 % starts with stored states",
            partial(torchrl, kind),
        )
        for kind in ("LSTM", "GRU")
    ],
]
