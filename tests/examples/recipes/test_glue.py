"""The GLUE example: its tasks are read as they are spelt, whoever made the files."""

import argparse
import importlib
import json
import lzma
import sys

import numpy as np
import pytest
from places import RECIPES, SHARED

pytest.importorskip("sklearn", reason="the examples extra is not installed")
transformers = pytest.importorskip("transformers", reason="the examples extra is not installed")
DATA = SHARED / "glue"
real = pytest.mark.skipif(
    not DATA.exists(), reason="the real files lie beside the project, not in it"
)


@pytest.fixture(scope="module")
def glue():
    sys.path.insert(0, str(RECIPES))
    yield importlib.import_module("glue_data")
    sys.path.remove(str(RECIPES))


# The official distribution's headers, and a row or two of each.
FILES = {
    "sst2": 'sentence\tlabel\na "b\t1\nc\t0\n',
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    '1\t2\t3\ta "b\tc\t1\n1\t2\t3\td\te\t0\n',
    "rte": 'index\tsentence1\tsentence2\tlabel\n0\ta "b\tc\tnot_entailment\n1\td\te\tentailment\n',
    "qnli": 'index\tquestion\tsentence\tlabel\n0\ta "b\tc\tnot_entailment\n1\td\te\tentailment\n',
    "mrpc": 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\ta "b\tc\r\n0\t7\t8\td\te\r\n',
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_read_by_its_header(glue, tmp_path, name, packed):
    task = glue.TASKS[name]
    text = ("\ufeff" + FILES[name]).encode()  # MRPC's begin with a byte order mark
    for file in (task.train, *task.held_out):
        place = tmp_path / task.folder / file
        place.parent.mkdir(exist_ok=True)
        if packed:
            place.with_name(f"{file}.xz").write_bytes(lzma.compress(text))
        else:
            place.write_bytes(text)
    first = (('a "b',) if name == "sst2" else ('a "b', "c"), 1)
    second = (("c",) if name == "sst2" else ("d", "e"), 0)
    train, held_out = glue.load(name, tmp_path)
    assert first != second
    assert sorted(train) == sorted(held_out) == sorted([first, second])


def test_mnli_leaves_out_what_its_annotators_did_not_agree_on(glue, tmp_path):
    head = "index\tsentence1\tsentence2\tgold_label\n"
    rows = "0\ta\tb\tcontradiction\n1\tc\td\t-\n2\te\tf\tneutral\n"
    (tmp_path / "MNLI").mkdir()
    (tmp_path / "MNLI" / "train.tsv").write_text(head + rows)
    (tmp_path / "MNLI" / "dev_matched.tsv").write_text(head)
    train, held_out = glue.load("mnli", tmp_path)
    assert (sorted(train), held_out) == ([(("a", "b"), 2), (("e", "f"), 1)], [])


def test_a_label_of_another_spelling_is_refused(glue, tmp_path):
    (tmp_path / "RTE").mkdir()
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "RTE" / file).write_text(FILES["rte"].replace("not_entailment", "1"))
    with pytest.raises(SystemExit, match="has the label '1', and RTE has entailment, not_entail"):
        glue.load("rte", tmp_path)


def test_columns_of_other_names_are_refused(glue, tmp_path):
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text("text\tlabel\na\t1\n")
    with pytest.raises(SystemExit, match=r"columns \['text', 'label'\], where SST-2 has"):
        glue.load("sst2", tmp_path)


def test_a_line_that_is_cut_off_is_left_out(glue, tmp_path):
    (tmp_path / "QQP").mkdir()
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "QQP" / file).write_text(FILES["qqp"] + "1\t2\t3\ta question of no pair\n")
    assert len(glue.load("qqp", tmp_path)[0]) == 2


def test_a_file_without_tabs_is_refused(glue, tmp_path):
    (tmp_path / "SST-2").mkdir()
    for text, words in (("sentence,label\na,1\n", "has the columns"), ("a,b\n", "SST-2 has")):
        (tmp_path / "SST-2" / "train.tsv").write_text(text)
        with pytest.raises(SystemExit, match=words):
            glue.load("sst2", tmp_path)
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "in_domain_train.tsv").write_text("gj04,1,,a b\n")
    with pytest.raises(SystemExit, match="has no row with tabs between source, label, mark, sent"):
        glue.load("cola", tmp_path)


def test_a_similarity_is_a_number(glue, tmp_path):
    (tmp_path / "STS-B").mkdir()
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "STS-B" / file).write_text("index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.5\n")
    assert glue.load("stsb", tmp_path)[0] == [(("a", "b"), 2.5)]
    truth, answers = np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 4.0])
    found = glue.score("stsb", truth, answers)
    assert found["spearman"] == 1
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, answers)[0, 1])
    assert found["pearson"] < 1


def test_the_metrics_are_those_of_glue(glue):
    truth, answers = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])
    assert glue.score("cola", truth, answers) == pytest.approx(
        {"matthews": 2 / np.sqrt(2 * 2 * 1 * 3), "accuracy": 0.75}
    )
    assert glue.score("mrpc", truth, answers) == pytest.approx({"accuracy": 0.75, "f1": 2 / 3})
    assert glue.score("rte", truth, answers) == {"accuracy": 0.75}


def test_the_paper_has_settings_for_every_task_and_method(glue):
    for task in glue.TASKS:
        for method in ("lora", "dora", "adalora", "adapter"):
            assert glue.paper(task, method)["s"] == 1e-4
    mrpc = glue.paper("mrpc", "adalora")
    assert (mrpc["penalty"], mrpc["lr"], mrpc["epochs"], mrpc["dropout"]) == (2e-8, 1e-4, 60, 0.0)
    assert glue.paper("stsb", "lora")["penalty"] == 8e-5
    assert glue.paper("cola", "adapter")["rank"] == 32


# Rows, and the class 1 among them, as the files' authors count them.
COUNTS = {
    "cola": ((8551, 6023), (1043, 719)),
    "mrpc": ((4076, 2753), (1725, 1147)),
    "sst2": ((67349, 37569), (872, 444)),
}


@real
@pytest.mark.parametrize("name", COUNTS)
def test_the_real_files_have_as_many_rows_as_their_authors_say(glue, name):
    for rows, count in zip(glue.load(name, DATA), COUNTS[name], strict=True):
        assert (len(rows), sum(label for _, label in rows)) == count
        assert all(text for texts, _ in rows for text in texts)


@real
def test_settings_are_chosen_on_a_part_that_is_neither_trained_nor_tested_on(glue):
    everything, development = glue.load("cola", DATA)
    train, validation = glue.load("cola", DATA, validation=True)
    assert len(validation) == 855 != len(development)
    assert sorted(train + validation) == sorted(everything)
    # Drawn, not cut: the file is ordered by where its sentences come from.
    few, _ = glue.load("cola", DATA, count=100)
    assert (
        few
        == everything[:100]
        != glue.read(DATA / "CoLA/in_domain_train.tsv", glue.TASKS["cola"])[:100]
    )


def call(glue, monkeypatch, *line):
    example = importlib.import_module("finetune_glue")
    monkeypatch.setattr(sys, "argv", ["finetune_glue.py", *map(str, line)])
    example.main()


def test_a_task_that_lacks_is_told_before_any_run(glue, monkeypatch, tmp_path, capsys):
    (tmp_path / "CoLA").mkdir()
    with pytest.raises(SystemExit):
        call(glue, monkeypatch, "--task", "cola", "mrpc", "--data", tmp_path, "--output", tmp_path)
    assert f"there is no {tmp_path / 'MRPC'}: --data is the folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["CoLA"]


def test_paper_is_tables_3_and_8(glue, monkeypatch):
    example = importlib.import_module("finetune_glue")
    found = []
    monkeypatch.setattr(example.recipe, "main", lambda runs, perform: found.extend(runs))
    line = "--paper --task mrpc cola --method adapter adalora --gate on --lr 1"
    call(glue, monkeypatch, *line.split())
    assert [
        (run.model, run.rank, run.scale, run.dropout, run.lr, run.batch_size, run.epochs, run.s,
         run.penalty)
        for run in found
    ] == [
        ("microsoft/deberta-v3-base", 32, 0.5, 0.0, 1, 32, 60, 1e-4, 2e-8),
        ("microsoft/deberta-v3-base", 4, 0.5, 0.0, 1, 32, 60, 1e-4, 2e-8),
        ("microsoft/deberta-v3-base", 32, 0.5, 0.1, 1, 32, 40, 1e-4, 4.5e-7),
        ("microsoft/deberta-v3-base", 4, 0.5, 0.1, 1, 32, 40, 1e-4, 5e-6),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta"])
def test_all_that_is_new_in_a_model_is_trained(glue, monkeypatch, tmp_path, kind):
    example = importlib.import_module("finetune_glue")
    rows = glue.made_up("cola")[0]
    tokenizer = example.tiny(argparse.Namespace(task="cola"), rows)[1]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    if kind == "DistilBert":
        sizes = {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, num_attention_heads=2, vocab_size=len(tokenizer), max_position_embeddings=64
    )
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    caught = []

    class Stopped(Exception):
        pass

    def fit(model, *args, **options):
        caught.append(model)
        raise Stopped

    monkeypatch.setattr(example.recipe, "fit", fit)
    monkeypatch.setattr(example.glue_data, "load", lambda *args: (rows, rows))
    with pytest.raises(Stopped):
        call(glue, monkeypatch, "--model", tmp_path / "model", "--output", tmp_path / "out")
    trained = {n for n, p in caught[0].named_parameters() if p.requires_grad}
    new = {
        "Bert": {"classifier.weight", "classifier.bias"},
        "DistilBert": {"pre_classifier.weight", "pre_classifier.bias", "classifier.weight",
                       "classifier.bias"},
        "Roberta": {"classifier.dense.weight", "classifier.dense.bias",
                    "classifier.out_proj.weight", "classifier.out_proj.bias"},
    }  # fmt: skip
    assert new[kind] <= trained
    frozen = {n for n, p in caught[0].named_parameters() if not p.requires_grad}
    assert any("embedding" in name for name in frozen)


@real
@pytest.mark.parametrize("task", ["cola", "mrpc", "sst2"])
def test_smoke_runs_on_real_rows(glue, monkeypatch, tmp_path, task):
    line = ["--smoke", "--epochs", 1, "--gate", 0.5, "--data", DATA, "--task", task]
    call(glue, monkeypatch, *line, "--output", tmp_path)
    found = json.loads((tmp_path / f"{task}-lora-0.5-0" / "results.json").read_text())
    assert all(module["samples"] == 32 for module in found["report"]["modules"].values())
    assert list(found["scores"]) == [glue.TASKS[task].folder]
