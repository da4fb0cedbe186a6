"""What the commands say of adapters and reports on disk: inspect, diff, report."""

import json

import pytest
import torch
from commands import refused, run, saved
from models import Net, away_from_initialisation
from safetensors.torch import load_file, save_file

import tokengate
from tokengate.command_line import main


def test_inspect(tmp_path, capsys):
    model = saved(tmp_path, rank={"*.q_proj": 2, "*": 3}, train=["head"], dropout=0.1)
    found = json.loads(run(capsys, "inspect", tmp_path, "--json"))
    assert found["methods"] == {"lora": 4}
    assert found["base_class"] == "models.Net"
    assert found["saved_by"] == f"tokengate {tokengate.__version__}"
    assert found["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["trained_beside"] == {"head.bias": [3], "head.weight": [3, 8]}
    assert found["asked"][0]["targets"] == ["q_proj", "fc1"]
    assert found["gated_layers"] == 4
    # In the model's order: q_proj, fc1, q_proj, fc1.
    expected = {
        "min": -0.5, "quartile_1": -0.05, "median": 0.15, "quartile_3": 0.225, "max": 0.3,
        "share_above_0": 0.75,
    }  # fmt: skip
    assert found["tau"] == pytest.approx(expected)
    layer = found["layers"]["blocks.1.fc1"]
    assert (layer["in_features"], layer["out_features"], layer["parameters"]) == (8, 16, 72)
    assert layer["options"]["rank"] == 3
    assert layer["options"]["dropout"] == 0.1
    assert layer["tau"] == -0.5
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert found["bytes"] == sizes
    text = run(capsys, "inspect", tmp_path)
    assert "4 layers of lora, 4 gated" in text
    assert "above 0 in 75 % of the gates" in text
    assert "head.weight [3, 8]" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["q_proj", "lora", "2", "8", "->", "8", "2", "64", "0.1", "to", "0.3"] in rows
    assert ["fc1", "lora", "3", "8", "->", "16", "2", "144", "-0.5", "to", "0.2"] in rows


def test_inspect_without_gates_and_with_one(tmp_path, capsys):
    saved(tmp_path / "a", gate=False)
    found = json.loads(run(capsys, "inspect", tmp_path / "a", "--json"))
    assert found["tau"] is None
    assert "tau" not in run(capsys, "inspect", tmp_path / "a").split("projection")[1]
    tokengate.save(tokengate.patch(Net(), ["blocks.0.fc1"], tau=0.5), tmp_path / "b")
    tau = json.loads(run(capsys, "inspect", tmp_path / "b", "--json"))["tau"]
    assert set(tau.values()) == {0.5, 1.0}


def test_inspect_shows_a_method_that_is_not_registered_here(tmp_path, capsys, monkeypatch):
    from tokengate.methods import registry

    monkeypatch.setattr(registry.METHODS, "kinds", dict(registry.METHODS.kinds))

    @tokengate.register("own")
    class Own(tokengate.methods.LoRA):
        pass

    tokengate.save(tokengate.patch(Net(), ["fc1"], "own"), tmp_path)
    del registry.METHODS.kinds["own"]
    assert "2 layers of own" in run(capsys, "inspect", tmp_path)


def test_diff(tmp_path, capsys):
    saved(tmp_path / "a", train=["head"])
    same = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "a", "--json"))
    assert {layer["distance"] for layer in same["layers"].values()} == {0.0}
    assert "6 with equal values" in run(capsys, "diff", tmp_path / "a", tmp_path / "a")

    model = saved(tmp_path / "x", train=["head"])
    layers = tokengate.layers(model)
    with torch.no_grad():
        layers["blocks.0.fc1"].modification.B.mul_(2)
        layers["blocks.1.fc1"].modification.B.mul_(1.01)
        layers["blocks.0.q_proj"].gate.tau.fill_(0.7)
        model.head.weight.mul_(3)
    tokengate.save(model, tmp_path / "b")
    found = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json"))
    assert list(found["layers"])[:2] == ["blocks.0.fc1", "blocks.1.fc1"]
    a = load_file(tmp_path / "a" / "adapter_model.safetensors")
    down, up = (a[f"blocks.0.fc1.modification.{x}"].double().norm() for x in "AB")
    expected = (up / (down**2 + up**2).sqrt()).item()
    assert found["layers"]["blocks.0.fc1"]["distance"] == pytest.approx(expected)
    assert found["layers"]["blocks.0.q_proj"] == {"distance": 0.0, "tau": pytest.approx([0.1, 0.7])}
    assert found["trained_beside"]["head.weight"]["distance"] == pytest.approx(2)
    assert found["options"] == {}
    lines = run(capsys, "diff", tmp_path / "a", tmp_path / "b").splitlines()
    names = [line.split()[0] for line in lines if line.startswith(("blocks", "head"))]
    assert names == ["blocks.0.fc1", "blocks.1.fc1", "blocks.0.q_proj", "head.weight"]
    assert lines[-1] == "2 with equal values"


def test_diff_of_zeros(tmp_path, capsys):
    for folder, bias in (("a", 0.0), ("b", 1.0)):
        model = tokengate.patch(Net(), ["fc1"], train=["head.bias"])
        torch.nn.init.constant_(model.head.bias, bias)
        tokengate.save(model, tmp_path / folder)
    for other, distance in (("a", 0.0), ("b", None)):
        found = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / other, "--json"))
        assert found["trained_beside"] == {"head.bias": {"distance": distance}}


def test_diff_of_other_layers_and_options(tmp_path, capsys):
    saved(tmp_path / "a", rank=2)
    torch.manual_seed(0)
    other = tokengate.patch(Net(), ["fc1", "v_proj"], rank=4, gate=False, train=["head"])
    tokengate.save(other, tmp_path / "b")
    found = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--json"))
    assert found["only_in_a"] == ["blocks.0.q_proj", "blocks.1.q_proj"]
    assert found["only_in_b"] == [
        "blocks.0.v_proj", "blocks.1.v_proj", "head.bias", "head.weight",
    ]  # fmt: skip
    assert found["options"]["blocks.0.fc1"] == {
        "rank": [2, 4], "gate": ["threshold", None], "penalty": [1e-5, None],
    }  # fmt: skip
    layer = found["layers"]["blocks.0.fc1"]
    assert layer == {"distance": None, "tau": [pytest.approx(0.2), None]}
    text = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert "options of blocks.0.fc1 and 1 more: rank 2 in a, 4 in b" in text
    assert "only in b: head.weight" in text
    dora = tokengate.patch(Net(), ["fc1"], "dora", rank=2)
    tokengate.save(dora, tmp_path / "c")
    found = json.loads(run(capsys, "diff", tmp_path / "a", tmp_path / "c", "--json"))
    assert found["options"]["blocks.0.fc1"]["method"] == ["lora", "dora"]


def test_refusals_are_one_sentence(tmp_path, capsys):
    assert "does not exist" in refused(capsys, "inspect", tmp_path / "nowhere")
    assert "does not exist" in refused(capsys, "plan", tmp_path / "no", "--targets", "a")
    saved(tmp_path)
    assert "does not exist" in refused(capsys, "diff", tmp_path, tmp_path / "nowhere")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "safetensors" in refused(capsys, "inspect", tmp_path)


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nforged: line", "\x9b2J", "\u202egnp", "\x7f"])
def test_names_of_strangers_are_shown_and_not_obeyed(tmp_path, capsys, name):
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    for folder, scale in (("a", 1), ("b", 2)):
        tokengate.patch(model, "all-linear", rank=2, train=["b"], scale=scale)
        away_from_initialisation(model)
        tokengate.save(model, tmp_path / folder)
        tokengate.unpatch(model)
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any(name in key for key in weights)
    for arguments in (["inspect", tmp_path / "a"], ["diff", tmp_path / "a", tmp_path / "b"]):
        text = run(capsys, *arguments)
        assert all(line.isprintable() for line in text.split("\n"))
        assert not any(line.startswith("forged") for line in text.split("\n"))
        assert run(capsys, *arguments, "--json").replace("\n", "").isprintable()
    weights.pop(next(key for key in weights if name in key))
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors")
    assert refused(capsys, "inspect", tmp_path / "a").strip().isprintable()


def test_report(tmp_path, capsys):
    model = tokengate.patch(Net(), ["q_proj"], tau=0.1)
    with tokengate.record(model) as rec:
        model(torch.randn(2, 3, 8))
    path = tmp_path / "report.json"
    rec.report().save(path)
    assert run(capsys, "report", path) == f"{rec.report()}\n"
    assert json.loads(run(capsys, "report", path, "--json"))["modules"].keys() == {
        "blocks.0.q_proj", "blocks.1.q_proj",
    }  # fmt: skip
    assert "report.html: written" in run(capsys, "report", path, "--html")
    assert 'role="tablist"' in (tmp_path / "report.html").read_text()
    run(capsys, "report", path, "--html", tmp_path / "other.html")
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "report.html").read_bytes()
    (tmp_path / "sub").mkdir()
    before = path.read_bytes()
    for itself in (path, tmp_path / "." / "sub" / ".." / "report.json"):
        assert "is the report itself" in refused(capsys, "report", path, "--html", itself)
    assert path.read_bytes() == before
    with pytest.raises(SystemExit):  # of two forms one would have been left out, silently
        main(["report", str(path), "--html", "--json"])
    path.write_text("{}")
    assert "is no report" in refused(capsys, "report", path)
