"""Training on the public API: data in, a run directory out.

    data -> task -> batches -> model -> loop -> run directory -> sampling

A `Task` is what is learned: `Text` is a language model, `Series` a forecast, `Classification` the class of a sequence.
`Config` holds every option, `prepare` reads the task it is for; `start` and `resume` open a run, `fit` trains it;
`rate_test` looks for a learning rate; `generate` samples from a language model, `forecast` says how a series goes on.
Nothing here prints. Each name is loaded when it is first used: options can be checked without torch.
"""

from typing import TYPE_CHECKING

from ..loading import attribute as _attribute

if TYPE_CHECKING:
    from typing import Any as _Any

    from .batches import RandomWindows as RandomWindows
    from .batches import Sequential as Sequential
    from .config import Config as Config
    from .documents import Numbered as Numbered
    from .documents import Texts as Texts
    from .errors import InputError as InputError
    from .errors import NonFiniteError as NonFiniteError
    from .forecasting import forecast as forecast
    from .inspection import record_run as record_run
    from .lanes import Lanes as Lanes
    from .loop import Trainer as Trainer
    from .model import LanguageModel as LanguageModel
    from .range_test import RateTest as RateTest
    from .range_test import rate_test as rate_test
    from .records import Record as Record
    from .records import Step as Step
    from .rundir import RunDirectory as RunDirectory
    from .sampling import generate as generate
    from .session import fit as fit
    from .session import resume as resume
    from .session import start as start
    from .tasks import Classification as Classification
    from .tasks import Series as Series
    from .tasks import Task as Task
    from .tasks import Text as Text
    from .tasks import prepare as prepare
    from .tokenfiles import Tokens as Tokens
    from .vocabulary import Vocabulary as Vocabulary
    from .window import Window as Window
del TYPE_CHECKING

_HOMES = {
    "RandomWindows": "batches",
    "Sequential": "batches",
    "Config": "config",
    "Numbered": "documents",
    "Texts": "documents",
    "InputError": "errors",
    "NonFiniteError": "errors",
    "forecast": "forecasting",
    "rate_test": "range_test",
    "record_run": "inspection",
    "Lanes": "lanes",
    "Trainer": "loop",
    "LanguageModel": "model",
    "RateTest": "range_test",
    "Record": "records",
    "Step": "records",
    "RunDirectory": "rundir",
    "generate": "sampling",
    "fit": "session",
    "resume": "session",
    "start": "session",
    "Classification": "tasks",
    "Series": "tasks",
    "Task": "tasks",
    "Text": "tasks",
    "prepare": "tasks",
    "Tokens": "tokenfiles",
    "Vocabulary": "vocabulary",
    "Window": "window",
}
"""The module of each public name."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> "_Any":
    return _attribute(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return __all__
