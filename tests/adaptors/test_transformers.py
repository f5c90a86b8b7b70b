"""transformers itself: the policy goes through `save_pretrained` and back, the doctor through its Trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bptt
from bptt.train import NonFiniteError

transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
adaptor = pytest.importorskip("bptt.adaptors.transformers", reason="needs the extra transformers", exc_type=ImportError)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


class Config(transformers.PretrainedConfig):
    model_type = "bptt-test"

    def __init__(self, hidden: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = hidden


class Model(adaptor.PolicyFromConfig, transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.rnn = nn.LSTM(2, config.hidden, num_layers=2, batch_first=True)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LSTM):
            for p in module.parameters():
                nn.init.constant_(p, 0.25)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y, _ = self.rnn(x)
        return {"logits": y} if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


def test_the_policy_goes_through_a_checkpoint(tmp_path: Path):
    model = Model(Config(bptt_gradient="truncated:3/2", bptt_memory="states"))
    assert type(model.rnn) is bptt.nn.LSTM
    assert (model.rnn.weight_hh_l0 == 0.25).all(), "initialised as torch's layer, then converted"
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (saved["bptt_gradient"], saved["bptt_memory"]) == ("truncated:3/2", "states")
    again = Model.from_pretrained(tmp_path)
    assert (str(again.rnn.gradient), again.rnn.memory) == ("truncated:3/2", "states")
    x = torch.randn(2, 5, 2)
    torch.testing.assert_close(again(x)["logits"], model(x)["logits"])
    again.train()
    again(x)["logits"].sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    adaptor.set_policy(again, "chunked:2")
    again.save_pretrained(tmp_path)
    assert str(Model.from_pretrained(tmp_path).rnn.gradient) == "chunked:2"
    assert type(Model(Config()).rnn) is nn.LSTM, "without an entry nothing is converted"


def test_what_is_wrong_is_said():
    with pytest.raises(TypeError, match="PolicyFromConfig must stand before PreTrainedModel: got Late"):

        class Late(transformers.PreTrainedModel, adaptor.PolicyFromConfig):
            pass

    with pytest.raises(ValueError, match="gradient must be one of"):
        Model(Config(bptt_gradient="chunk"))
    model = Model(Config())
    with pytest.raises(ValueError, match="gradient must be one of"):
        adaptor.set_policy(model, "chunk")
    assert not hasattr(model.config, "bptt_gradient")


def rows(*spoilt: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    made = [{"x": torch.randn(5, 2), "labels": torch.randn(5, 3)} for _ in range(6)]
    for i in spoilt:
        made[i]["x"][2] = torch.nan
    return made


def fit(path: Path, model: nn.Module, data: Any, *callbacks: Any) -> Any:
    options = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "use_cpu": True, "report_to": []}
    arguments = transformers.TrainingArguments(
        str(path), save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", learning_rate=0.1, **options
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(data, batch_size=1)
    return trainer.train()


def test_the_doctor_leaves_a_step_out(tmp_path: Path):
    model, expected = Model(Config(bptt_gradient="full")), Model(Config(bptt_gradient="full"))
    doctor = adaptor.GradientDoctor("skip")
    with pytest.warns(UserWarning, match="step 2 is left out: forward: `rnn`, step 2, lane 0: its input holds NaN"):
        fit(tmp_path, model, rows(1), doctor)
    assert doctor.skipped == 1
    fit(tmp_path, expected, [row for i, row in enumerate(rows()) if i != 1])
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    with pytest.raises(NonFiniteError, match="step 3: forward"):
        fit(tmp_path, model, rows(2), adaptor.GradientDoctor())
