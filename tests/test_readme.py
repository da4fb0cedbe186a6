"""The README's Python runs as printed, on a tiny model in place of the large one."""

import pathlib

import pytest
import torch

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


class Tokenizer:
    def __call__(self, text, return_tensors):
        return {"input_ids": torch.arange(3, 3 + len(text.split()))[None]}


def test_the_language_model_example(monkeypatch, capsys):
    (code,) = [part.split("```")[0] for part in README.split("```python\n")[1:]]
    assert len([line for line in code.splitlines() if line]) <= 15
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip

    def model(name, dtype):
        return transformers.LlamaForCausalLM(config).to(dtype)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    scope = {}
    exec(code, scope)
    assert len(tokengate.layers(scope["model"])) == 4
    assert "sparsity (%)" in capsys.readouterr().out


def test_the_api_table_names_what_there_is():
    table = README.split("## The API")[1].split("##")[0]
    for name in ("patch", "unpatch", "disabled", "layers", "param_groups", "TauAdam", "record"):
        assert f"`{name}(" in table
        assert hasattr(tokengate, name)
    for name in ("token_gate", "TokenGate", "GatedLinear", "SparsityReport", "TokenGateError"):
        assert f"`{name}" in table
        assert hasattr(tokengate, name)
