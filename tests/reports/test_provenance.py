"""What a report says of itself."""

import json
import re

import torch
from models import Net, away_from_initialisation, one_sentence
from torch import nn

import tokengate
from tokengate.adapters.base_model import class_name
from tokengate.reports.provenance import name_of_model


def recorded(model):
    with tokengate.record(model) as rec:
        model(torch.randn(2, 5, 8))
    return rec.report()


def test_a_report_says_what_was_recorded(tmp_path):
    model = tokengate.patch(Net(), ["q_proj", "v_proj"], method="dora", rank=3, penalty=1e-5)
    report = recorded(away_from_initialisation(model))
    date = report.about.pop("date")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", date)
    versions = report.about.pop("versions")
    assert f"tokengate {tokengate.__version__}, torch {torch.__version__}" in versions
    assert report.about == {
        "model": "Net",
        "method": "dora",
        "gate": "threshold",
        "rank": "3",
        "scale": "0.5",
        "lambda": "1e-05",
    }
    report.save(tmp_path / "report.json")
    assert tokengate.SparsityReport.load(tmp_path / "report.json").about == report.about


def test_where_layers_differ_all_is_said():
    model = tokengate.patch(Net(), ["q_proj"], rank={"blocks.0.*": 2, "*": 4}, gate=False)
    about = recorded(model).about
    assert (about["rank"], about["gate"]) == ("2, 4", "none")
    assert "lambda" not in about


def test_a_folder_of_this_machine_is_not_named():
    model = Net()
    model.config = type("Config", (), {"_name_or_path": "meta-llama/Llama-3-8B"})()
    assert name_of_model(model) == "Net meta-llama/Llama-3-8B"
    for path in ("/home/someone/models/mine", "./models/mine", "~/mine"):
        model.config._name_or_path = path
        assert name_of_model(tokengate.patch(model, ["q_proj"])) == "Net mine"
        tokengate.unpatch(model)


def test_a_model_of_classes_that_are_given_in_turn_has_its_own_name():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    said = name_of_model(model), class_name(model)
    tokengate.patch(model, ["linear1"])  # its fast path is closed, and it is followed
    assert (name_of_model(model), class_name(model)) == said
    assert said[1] == "torch.nn.modules.transformer.TransformerEncoder"


def test_a_report_of_an_earlier_version_says_nothing_of_it(tmp_path):
    report, path = recorded(tokengate.patch(Net(), ["q_proj"])), tmp_path / "report.json"
    report.save(path)
    found = json.loads(path.read_text())
    assert found.pop("about") == report.about
    path.write_text(json.dumps(found))
    assert tokengate.SparsityReport.load(path).about == {}
    for wrong in ([], {"model": 1}, "x"):
        path.write_text(json.dumps({**found, "about": wrong}))
        with one_sentence("is no report"):
            tokengate.SparsityReport.load(path)


def test_of_two_it_is_the_later():
    one, later = (recorded(tokengate.patch(Net(), ["q_proj"], rank=r)) for r in (1, 2))
    assert one.merge(later).about["rank"] == "2"
    assert one.merge(tokengate.SparsityReport(later.modules)).about["rank"] == "1"
