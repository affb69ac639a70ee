"""Models by path and by callable: what is accepted, and what every refusal says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from galvatron_compile.errors import ShapeError
from galvatron_compile.models import load_model
from galvatron_compile.passes.capture import capture

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 48,
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    settings = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    file.write_text(json.dumps(settings))
    return file


def test_a_folder_or_its_config_gives_the_model_without_weights(tmp_path: Path) -> None:
    file = write(tmp_path)
    for spec in (str(tmp_path), str(file)):
        model = load_model(spec, None, torch.float32)
        assert type(model.module).__name__ == "LlamaForCausalLM"
        assert {(p.device.type, p.dtype) for p in model.module.parameters()} == {
            ("meta", torch.float32)
        }
        assert model.seq == 48 and model.module.config._attn_implementation == "sdpa"
        assert model.module.config.use_cache is False and model.module.training
    assert load_model(str(file), 16).seq == 16
    assert capture(model.module, model.example_inputs).batch_symbol is not None


def test_other_architectures_that_return_a_loss(tmp_path: Path) -> None:
    t5 = {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32,
        "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 64,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(t5))
    model = load_model(str(file), 16)
    assert model.example_inputs["use_cache"] is False  # type: ignore[call-overload]
    assert capture(model.module, model.example_inputs).batch_symbol is not None
    write(tmp_path, architectures=None)
    assert type(load_model(str(file)).module).__name__ == "LlamaForCausalLM"
    write(tmp_path, model_type="bert", architectures=["BertForMaskedLM"])
    assert type(load_model(str(file)).module).__name__ == "BertForMaskedLM"


def test_configs_that_cannot_be_used_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ShapeError, match=r"holds no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(ShapeError, match="there is no file or folder"):
        load_model(str(tmp_path / "absent.json"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ShapeError, match="not readable JSON"):
        load_model(str(tmp_path))
    write(tmp_path, model_type=None)
    with pytest.raises(ShapeError, match="no field model_type"):
        load_model(str(tmp_path))
    write(tmp_path, model_type="nonsense")
    with pytest.raises(ShapeError, match="transformers cannot build"):
        load_model(str(tmp_path))
    write(tmp_path, architectures=["LlamaModel"])
    with pytest.raises(ShapeError, match=r"LlamaModel is not a language model.*module:callable"):
        load_model(str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    with pytest.raises(ShapeError, match=r"names no longest sequence.*--seq"):
        load_model(str(file))
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(ShapeError, match="pip install transformers"):
        load_model(str(tmp_path))


SOURCE = '''
import torch
from torch import nn

class Inner:
    @staticmethod
    def build():
        return nn.Linear(8, 4), (torch.zeros(2, 8),), lambda out, batch: out.sum()

def build():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    return model, {"input": torch.zeros(2, 12, dtype=torch.int64)}

def nothing():
    return None

def wrong_module():
    return 1, (torch.zeros(2),)

def wrong_inputs():
    return nn.Linear(2, 2), [torch.zeros(2)]

def no_tensor():
    return nn.Linear(2, 2), {}

def wrong_loss():
    return nn.Linear(2, 2), (torch.zeros(2),), "mean"

def fails():
    raise RuntimeError("no such table")

number = 3
'''


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_user_model.py").write_text(SOURCE)
    (tmp_path / "needy_user_model.py").write_text("import a_module_that_is_absent")
    (tmp_path / "broken_user_model.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    for name in ("some_user_model", "needy_user_model", "broken_user_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "some_user_model"


def test_a_callable_is_found_in_the_current_directory(user_module: str) -> None:
    before = list(sys.path)
    model = load_model(f"{user_module}:build")
    assert (model.seq, model.loss_fn, model.name) == (12, None, f"{user_module}:build")
    assert model.num_parameters == 16 * 8 + 8 * 16 + 16
    assert {p.device.type for p in model.module.parameters()} == {"meta"}
    assert load_model(f"{user_module}:build", 12).seq == 12
    dotted = load_model(f"{user_module}:Inner.build")
    assert dotted.seq == 1 and dotted.loss_fn is not None
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("some_user_model:", "must read package.module:callable"),
        ("an_absent_module:build", "no module an_absent_module; run in the folder"),
        ("needy_user_model:build", "needs a_module_that_is_absent; install it"),
        ("broken_user_model:build", "raised ZeroDivisionError"),
        ("some_user_model:bild", r"has no bild; callables there: .*build"),
        ("some_user_model:number", "not callable"),
        ("some_user_model:nothing", "it must return"),
        ("some_user_model:wrong_module", "type int as the module"),
        ("some_user_model:wrong_inputs", "type list as example inputs"),
        ("some_user_model:no_tensor", "hold no tensor"),
        ("some_user_model:wrong_loss", "type str as the loss"),
        ("some_user_model:fails", "raised RuntimeError: no such table"),
    ],
)
def test_a_callable_that_does_not_do_is_named(user_module: str, spec: str, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        load_model(spec)


def test_a_sequence_that_contradicts_the_callable_is_refused(user_module: str) -> None:
    with pytest.raises(ShapeError, match="makes samples of 12 tokens, so a sequence of 16"):
        load_model(f"{user_module}:build", 16)
