"""The README's Python runs as printed, on a tiny model in place of the large one."""

import pathlib
import re

import pytest
import torch

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


CODE = [part.split("```")[0] for part in README.split("```python\n")[1:]]


class Tokenizer:
    def __call__(self, text, return_tensors):
        return {"input_ids": torch.arange(3, 3 + len(text.split()))[None]}


def test_the_language_model_example(monkeypatch, capsys):
    code = CODE[0]
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


def test_the_adalora_example(capsys):
    assert len(CODE) == 2
    scope = {}
    exec(CODE[1], scope)
    assert sum(scope["allocator"].ranks.values()) == 8
    assert str(scope["allocator"].ranks) in capsys.readouterr().out


def test_the_table_of_methods():
    from tokengate.modifications import registry

    rows = [line.split("|") for line in README.splitlines() if line.startswith('| `"')]
    options = {row[1].strip(' `"'): row[3] for row in rows}
    assert options["dora"].strip() == 'as `"lora"`'
    assert set(options) == {"lora", "dora", "adalora", "adapter"}
    for method in ("lora", "adalora", "adapter"):
        named = re.findall(r"`(\w+)`", options[method])
        assert named == registry._options_of(registry.find_method(method))


def test_the_api_table_names_what_there_is():
    table = README.split("## The API")[1].split("##")[0]
    called = "patch unpatch disabled layers param_groups TauAdam record RankAllocator orthogonality"
    for name in (*called.split(), "register", "verify", "Slices"):
        assert f"`{name}(" in table
        assert hasattr(tokengate, name)
    others = "token_gate TokenGate GatedLinear SparsityReport TokenGateError Modification Factors"
    for name in (*others.split(), "LoRA", "DoRA", "AdaLoRA", "Adapter", "UnreachedLayerWarning"):
        assert f"`{name}" in table
        assert hasattr(tokengate, name)
