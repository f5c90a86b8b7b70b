"""sb3-contrib: recurrent policies for RecurrentPPO that take a rollout in one call, episodes' starts and all.

`RecurrentPPO(MlpLstmPolicy, env, policy_kwargs={"gradient": "chunked:16"})`, with MlpLstmPolicy from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import policies
from ..memory import Checkpoints
from ..nn import LSTM, convert
from .missing import missing

if TYPE_CHECKING:
    from sb3_contrib.common.recurrent.policies import (
        RecurrentActorCriticCnnPolicy,
        RecurrentActorCriticPolicy,
        RecurrentMultiInputActorCriticPolicy,
    )
else:
    try:
        from sb3_contrib.common.recurrent.policies import (
            RecurrentActorCriticCnnPolicy,
            RecurrentActorCriticPolicy,
            RecurrentMultiInputActorCriticPolicy,
        )
    except ModuleNotFoundError as error:
        raise missing("sb3_contrib", ("sb3_contrib", "stable_baselines3", "gymnasium"), error) from None

__all__ = ["CnnLstmPolicy", "InOneCall", "MlpLstmPolicy", "MultiInputLstmPolicy"]

States = tuple[Tensor, Tensor]


class InOneCall:
    """What a recurrent policy of sb3-contrib gets, where this class stands before it: layers of `bptt.nn`.

    gradient, memory, kernel: as in `bptt.nn.LSTM`, by default "full", "auto" and "auto"; after the policy's own
    arguments, thus in `policy_kwargs`.

    sb3-contrib calls its LSTM one step at a time wherever an episode starts within a batch. Here the starts are
    `resets` of one call, with the same values and gradients. `RecurrentPPO.save` keeps policy_kwargs, so that
    `load` builds the same layers; so do `policy.save` and `load` of the policy alone, which also keep the LSTM's size.
    A model that was saved with sb3-contrib's policy loads into this one:
    `custom_objects={"policy_class": MlpLstmPolicy}`.
    """

    lstm_actor: Any
    lstm_critic: Any

    def __init__(
        self,
        *args: Any,
        gradient: str | policies.Policy = "full",
        memory: str | Checkpoints = "auto",
        kernel: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        convert(self, gradient, memory=memory, kernel=kernel, strict=True)  # type: ignore[type-var]  # of the class that it is mixed with

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: States, episode_starts: Tensor, lstm: LSTM
    ) -> tuple[Tensor, States]:
        """sb3-contrib's method: the layer's outputs for features `[n_seq * T, I]`, `[n_seq * T, H]`, and its states.

        episode_starts `[n_seq * T]` are numbers, not 0 where an episode starts.
        """
        n_seq = lstm_states[0].shape[1]
        x = features.reshape(n_seq, -1, lstm.input_size).transpose(0, 1)
        starts = episode_starts.reshape(n_seq, -1).T != 0
        y, states = lstm(x, lstm_states, resets=starts if bool(starts.any()) else None)
        return y.transpose(0, 1).flatten(0, 1), states

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """sb3's method: what `policy.save` keeps."""
        actor = self.lstm_actor
        data: dict[str, Any] = super()._get_constructor_parameters()  # type: ignore[misc]  # of the class that it is mixed with
        own = ("shared_lstm", "enable_critic_lstm", "lstm_kwargs", "share_features_extractor")
        data.update({name: getattr(self, name) for name in own})
        data.update(lstm_hidden_size=actor.hidden_size, n_lstm_layers=actor.num_layers)
        data.update(gradient=str(actor.gradient), memory=str(actor.memory), kernel=actor.kernel)
        return data


class MlpLstmPolicy(InOneCall, RecurrentActorCriticPolicy):
    """sb3-contrib's MlpLstmPolicy with `gradient`, `memory` and `kernel` (see `InOneCall`)."""


class CnnLstmPolicy(InOneCall, RecurrentActorCriticCnnPolicy):
    """sb3-contrib's CnnLstmPolicy with `gradient`, `memory` and `kernel` (see `InOneCall`)."""


class MultiInputLstmPolicy(InOneCall, RecurrentMultiInputActorCriticPolicy):
    """sb3-contrib's MultiInputLstmPolicy with `gradient`, `memory` and `kernel` (see `InOneCall`)."""
