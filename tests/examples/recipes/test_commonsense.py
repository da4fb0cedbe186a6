"""The commonsense recipe: LLM-Adapters' rows, answers in what is generated, whole runs."""

import collections
import importlib
import json
import lzma
import shutil
import sys

import pytest
import torch
from commonsense_runs import RECIPES, answer_by_length, divided, ranked
from models import away_from_initialisation
from places import SHARED
from two_ranks import start, wait_for

import tokengate

pytest.importorskip("tqdm", reason="the examples extra is not installed")
pytest.importorskip("tokenizers", reason="the examples extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
DATA = SHARED / "commonsense"
MODULES = ("commonsense", "commonsense_data", "commonsense_model", "recipe", "recipe_results")
real = pytest.mark.skipif(not DATA.exists(), reason="the real files lie beside the project")


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPES))
    yield importlib.import_module("commonsense")
    sys.path.remove(str(RECIPES))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run(recipe, monkeypatch, tmp_path):
    """Run the recipe with these arguments; every run's results, by the name of its folder."""

    def main(*arguments):
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["commonsense.py", "--output", str(out), *arguments])
        recipe.main()
        return {p.parent.name: json.loads(p.read_text()) for p in out.glob("*/results.json")}

    return main


@pytest.fixture
def planned(recipe, monkeypatch):
    def plan(*arguments):
        found = []
        monkeypatch.setattr(sys, "argv", ["commonsense.py", *arguments])
        monkeypatch.setattr(recipe.recipe, "main", lambda runs, perform: found.extend(runs))
        recipe.main()
        return found

    return plan


def row(instruction="Which?", answer="answer2", given=""):
    output = f"the correct answer is {answer}"
    return {"instruction": instruction, "input": given, "output": output, "answer": answer}


# The form of the data.


def test_a_prompt_ends_where_the_response_begins(recipe):
    assert recipe.data.prompt(row("Which?")) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nWhich?\n\n### Response:\n"
    )
    assert recipe.data.prompt(row("Which?", given="Of these.")) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhich?\n\n### Input:\nOf these.\n\n### Response:\n"
    )


FORMS = {
    "PIQA": ("piqa", "solution1 solution2"),
    "BoolQ": ("boolq", "true false"),
    "HellaSwag": ("hellaswag", "ending1 ending2 ending3 ending4"),
    "WinoGrande": ("winogrande", "option1 option2"),
    "SIQA": ("social_i_qa", "answer1 answer2 answer3 answer4 answer5"),
    "OBQA": ("openbookqa", "answer1 answer2 answer3 answer4 answer5"),
    "ARC-e": ("ARC-Easy", "answer1 answer2 answer3 answer4 answer5"),
    "ARC-c": ("ARC-Challenge", "answer1 answer2 answer3 answer4 answer5"),
}


def test_the_tests_are_those_of_table_1_with_their_folders_and_answers(recipe):
    found = {n: (t.folder, " ".join(t.answers)) for n, t in recipe.data.TASKS.items()}
    assert found == FORMS
    assert list(found) == list(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_an_answer_is_the_first_that_a_response_names(recipe, name):
    task = recipe.data.TASKS[name]
    first, last = task.answers[0], task.answers[-1]
    for answer in task.answers:
        assert task.answer(f"the correct answer is {answer}") == answer
    assert task.answer(f"not {last}, {first} it is") == last != first
    assert task.answer("the correct answer is 42 or perhaps answer9") is None
    assert task.answer(first.upper()) is None


def write(folder, name, part, rows):
    path = folder / FORMS[name][0] / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def test_all_train_files_are_taken_unless_there_is_one_for_all(recipe, tmp_path):
    piqa, boolq = [row("p", "solution1")], [row("b", "true")]
    write(tmp_path, "PIQA", "test", piqa)
    write(tmp_path, "BoolQ", "test", boolq)
    write(tmp_path, "BoolQ", "train", boolq * 2)
    write(tmp_path, "OBQA", "train", [row()])
    train, tests, missing = recipe.data.load(tmp_path)
    assert train == [*boolq * 2, row()]
    assert tests == {"PIQA": piqa, "BoolQ": boolq}
    others = [name for name in FORMS if name not in ("PIQA", "BoolQ", "OBQA")]
    assert set(missing) == {
        "PIQA (train)", "OBQA (test)", *(f"{n} ({p})" for n in others for p in ("train", "test")),
    }  # fmt: skip

    together = json.dumps([row("together")] * 3).encode()
    (tmp_path / "commonsense_170k.json.xz").write_bytes(lzma.compress(together))
    train, tests, missing = recipe.data.load(tmp_path)
    assert train == [row("together")] * 3
    assert list(tests) == ["PIQA", "BoolQ"]
    assert set(missing) == {f"{name} (test)" for name in (*others, "OBQA")}

    (tmp_path / "mine.json").write_text(json.dumps([row("mine")]))
    train, tests, _ = recipe.data.load(tmp_path / "mine.json")
    assert train == [row("mine")]
    assert list(tests) == ["PIQA", "BoolQ"]


def test_a_folder_without_rows_is_named(recipe, tmp_path):
    with pytest.raises(SystemExit, match="has no rows to test with: pass as --data a folder with"):
        recipe.data.load(tmp_path)
    write(tmp_path, "PIQA", "test", [row()])
    with pytest.raises(SystemExit, match="has no rows to train on: pass as --data a folder with"):
        recipe.data.load(tmp_path)
    write(tmp_path, "PIQA", "train", [row()])
    with pytest.raises(SystemExit, match=r"there is no .*mine.json: pass as --data"):
        recipe.data.load(tmp_path / "mine.json")


def test_rows_are_drawn_alike_each_time(recipe):
    rows = [row(str(n)) for n in range(20)]
    few = recipe.data.drawn(rows, 5)
    assert few == recipe.data.drawn(rows, 5) != rows[:5]
    assert len(recipe.data.drawn(rows, 50)) == 20
    assert sorted(recipe.data.drawn(rows, None), key=str) == sorted(rows, key=str)


COUNTS = {  # train, test
    "PIQA": (0, 1838),
    "BoolQ": (9427, 3270),
    "OBQA": (4957, 500),
    "ARC-e": (2251, 2376),
    "ARC-c": (1119, 1172),
}


@real
def test_the_real_files_answer_themselves(recipe):
    train, tests, missing = recipe.data.load(DATA)
    assert {name: len(rows) for name, rows in tests.items()} == {
        n: c for n, (_, c) in COUNTS.items()
    }
    assert len(train) == sum(count for count, _ in COUNTS.values())
    assert "PIQA (train)" in missing
    assert "HellaSwag (test)" in missing
    for name, rows in tests.items():
        task = recipe.data.TASKS[name]
        assert all(task.answer(row["output"]) == row["answer"] for row in rows)
        # Not in the prompt alone: it names all of them.
        assert {row["answer"] for row in rows} <= set(task.answers)


def test_made_up_rows_are_in_the_form_of_the_real_ones(recipe):
    train, tests = recipe.data.made_up()
    assert list(tests) == list(FORMS)
    for name, rows in tests.items():
        assert all(recipe.data.TASKS[name].answer(row["output"]) == row["answer"] for row in rows)
    assert len(train) == 64
    assert set(train[0]) == {"instruction", "input", "output", "answer"}


# The settings.


def test_the_defaults_are_those_of_tables_1_and_6(planned):
    runs = planned("--method", "lora", "dora", "adalora", "--gate", "on")
    for run in runs:
        assert (run.rank, run.scale, run.dropout, run.lr) == (32, 0.5, 0.05, 1e-4)
        assert (run.scheduler, run.batch_size, run.epochs, run.s) == ("linear", 16, 3, 4e-5)
        assert (run.model, run.dtype) == ("meta-llama/Meta-Llama-3-8B", "bfloat16")
    assert [run.penalty for run in runs] == [4.5e-5, 1e-5, 1e-4]


def test_what_is_given_goes_before_presets_and_these_before_defaults(planned):
    (run,) = planned("--smoke", "--gate", "on", "--rank", "4", "--penalty", "0.5")
    assert (run.rank, run.penalty) == (4, 0.5)  # given
    assert (run.lr, run.epochs) == (1e-2, 2)  # of --smoke, and not of Table 6
    assert run.scale == 0.5  # Table 6


# Training rows.


def tiny(recipe, new_tokens=8):
    """A model and a tokenizer of the made-up rows, these, and the run that they are of."""
    torch.manual_seed(0)
    run = recipe.argparse.Namespace(
        smoke=True, dtype="float32", new_tokens=new_tokens, method="lora", gate="on", rank=2,
        penalty=1e-5, scale=0.5, dropout=0.0, seed=0,
    )  # fmt: skip
    train, tests = recipe.data.made_up()
    model, tokenizer = recipe.loaded(run, train)
    targets = recipe.roles(model, *recipe.PAPER_TARGETS["commonsense"])
    recipe.recipe.patch(model, targets, run)
    return model, tokenizer, train, tests


def test_the_loss_is_of_prompt_response_and_end(recipe, capsys):
    _, tokenizer, train, _ = tiny(recipe)
    (found,) = recipe.encoded(train[:1], tokenizer, 512)
    text = tokenizer.decode(found["input_ids"])
    assert text == recipe.data.prompt(train[0]) + train[0]["output"] + "</s>"
    assert found["labels"] == found["input_ids"]
    assert found["attention_mask"] == [1] * len(found["input_ids"])
    assert capsys.readouterr().out == ""


def test_what_is_cut_off_is_counted(recipe, capsys):
    _, tokenizer, train, _ = tiny(recipe)
    whole = recipe.encoded(train, tokenizer, 512)
    longest = max(len(row["input_ids"]) for row in whole)
    most = sum(len(row["input_ids"]) == longest for row in whole)
    assert 0 < most < len(train)
    cut = recipe.encoded(train, tokenizer, longest - 1)
    assert f"{most} of 64 rows are longer than {longest - 1} tokens" in capsys.readouterr().out
    assert [row["labels"] for row in cut] == [row["labels"][: longest - 1] for row in whole]
    assert {len(row["labels"]) == len(row["attention_mask"]) for row in cut} == {True}


def test_padding_is_on_the_left_and_no_part_of_the_loss(recipe):
    _, tokenizer, train, _ = tiny(recipe)
    rows = sorted(recipe.encoded(train, tokenizer, 512), key=lambda row: len(row["labels"]))
    batch = recipe.DataCollatorForSeq2Seq(tokenizer)([rows[0], rows[-1]])
    padding = len(rows[-1]["labels"]) - len(rows[0]["labels"])
    assert padding > 0
    assert batch["labels"][0, :padding].eq(-100).all()
    assert batch["labels"][0, padding:].tolist() == rows[0]["labels"]
    assert batch["attention_mask"][0].sum() == len(rows[0]["labels"])


# Evaluation.


def test_responses_are_compared_with_answers(recipe, monkeypatch):
    model, tokenizer, _, _ = tiny(recipe)
    responses = {
        "a": "the correct answer is answer1",
        "b": "answer3, not answer1",
        "c": "I do not know",
        "a longer question": "answer2",
    }
    rows = [row(question, "answer1") for question in responses]
    rows[-1]["answer"] = "answer2"
    plain = model.generate

    def generate(input_ids, attention_mask):
        plain(input_ids=input_ids, attention_mask=attention_mask)  # or nothing were recorded
        asked = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        said = [r for text in asked for q, r in responses.items() if f"\n{q}\n" in text]
        assert len(said) == len(asked)
        tokens = tokenizer(said, padding=True, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, tokens], 1)

    monkeypatch.setattr(model, "generate", generate)
    found, _ = recipe.evaluate(model, tokenizer, "ARC-c", rows, 3, 0)
    assert found == {"right": 2, "wrong": 1, "no answer": 1}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_sparsity_is_that_of_the_prompts_one_by_one(recipe, batch_size):
    model, tokenizer, _, tests = tiny(recipe)
    away_from_initialisation(model, 0.1)
    for layer in tokengate.layers(model).values():
        torch.nn.init.constant_(layer.gate.tau, 0.3)
    rows = tests["SIQA"]
    lengths = []
    with tokengate.record(model.eval()) as rec, torch.no_grad():
        for each in rows:
            prompt = tokenizer(recipe.data.prompt(each), return_tensors="pt")
            lengths.append(prompt["input_ids"].shape[1])
            model(**prompt)
    expected = rec.report()
    assert len(set(lengths)) > 1  # or there were no padding
    assert 0.1 < expected.sparsity < 0.9
    _, report = recipe.evaluate(model, tokenizer, "SIQA", rows, batch_size, 0)
    for name, module in report.modules.items():
        assert (module.samples, module.positions) == (8, sum(lengths))
        assert module.sparsity == pytest.approx(expected.modules[name].sparsity, abs=2e-3)


def test_generation_is_greedy_and_stops(recipe):
    model, tokenizer, _, tests = tiny(recipe, new_tokens=3)
    prompt = tokenizer(recipe.data.prompt(tests["PIQA"][0]), return_tensors="pt")
    once, again = model.eval().generate(**prompt), model.generate(**prompt)
    assert once.equal(again)
    assert once.shape[1] == prompt["input_ids"].shape[1] + 3
    best = model(**prompt).logits[0, -1].argmax()
    assert once[0, prompt["input_ids"].shape[1]] == best


# Runs.


def test_smoke_trains_tests_and_does_no_run_again(recipe, run, monkeypatch):
    found = run("--smoke")
    assert set(found) == {"lora-off-0", "lora-on-0"}
    for name, kept in found.items():
        assert list(kept["scores"]) == list(FORMS) == list(kept["reports"])
        assert all(sum(kept["answers"][test].values()) == 8 for test in FORMS)
        assert kept["tokens_per_second"] > 0
        assert kept["peak_memory"] is None or torch.cuda.is_available()
        closed = [value > 0 for value in kept["sparsity"].values()]
        assert all(closed) if name == "lora-on-0" else not any(closed)
    monkeypatch.setattr(recipe, "perform", lambda run: pytest.fail("a run was done again"))
    assert run("--smoke") == found


@real
def test_smoke_with_real_rows_says_what_there_is_not(run, capsys):
    found = run("--smoke", "--gate", "on", "--method", "dora", "--data", str(DATA))["dora-on-0"]
    assert list(found["scores"]) == list(COUNTS)
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("not found")]
    assert "HellaSwag (test)" in line


def test_without_data_there_is_one_sentence(run):
    with pytest.raises(SystemExit, match="pass --data"):
        run("--random-weights")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.filterwarnings(
    "ignore::tokengate.errors.RankWarning"
)  # the paper's ranks, on a tiny model
def test_a_pretrained_model_and_one_of_its_size_without_its_weights(recipe, run, tmp_path):
    model, tokenizer, train, tests = tiny(recipe)
    tokengate.unpatch(model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write(tmp_path / "data", "OBQA", "train", train[:20])
    write(tmp_path / "data", "OBQA", "test", tests["OBQA"])
    few = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--gate", "on"]
    few += ["--epochs", "1", "--batch-size", "4", "--new-tokens", "2", "--test-rows", "3"]
    found = run(*few)["lora-on-0"]
    assert sum(found["answers"]["OBQA"].values()) == 3
    assert found["settings"]["dtype"] == "bfloat16"
    others = ["--method", "adalora", "--random-weights", "--gradient-checkpointing"]
    found = run(*few, *others)["adalora-on-0"]
    # 20 rows in steps of 4, the first of which is not counted.
    assert found["tokens_per_second"] > 0
    assert len([entry for entry in found["log"] if "loss" in entry]) == 5


@pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed compiles what it needs on a CPU")
def test_a_divided_model_is_trained_as_a_whole_one(processes, run, tmp_path, monkeypatch, recipe):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    asked = ["--smoke", "--gate", "on", "--batch-size", "8", "--test-batch-size", "3"]
    asked += ["--rows", "24", "--epochs", "1", "--s", "0.13"]
    ways = {"fsdp": ["--fsdp"], "zero": ["--deepspeed"]}
    runs = [[*asked, *way, "--output", str(tmp_path / name)] for name, way in ways.items()]
    wait_for(start(processes, divided, runs), 900)
    monkeypatch.setattr(recipe.data.Task, "answer", answer_by_length)
    one = run(*asked)["lora-on-0"]
    losses = [entry["loss"] for entry in one["log"] if "loss" in entry]
    for name in ways:
        found = json.loads((tmp_path / name / "lora-on-0" / "results.json").read_text())
        assert found["on"]["processes"] == 2
        theirs = [entry["loss"] for entry in found["log"] if "loss" in entry]
        assert theirs == pytest.approx(losses, abs=1e-4)
        assert len(set(losses)) == len(losses) == 3
        assert found["answers"] == one["answers"]
        for test, sparsity in one["sparsity"].items():
            assert found["sparsity"][test] == pytest.approx(sparsity, abs=0.5)


def test_two_processes_find_what_one_does(recipe, processes, tmp_path, monkeypatch):
    # Three batches: one process has one more than the other.
    asked = ["--smoke", "--gate", "on", "--batch-size", "8", "--test-batch-size", "3"]
    wait_for(start(processes, ranked, [*asked, "--output", str(tmp_path)]))
    found = json.loads((tmp_path / "lora-on-0" / "results.json").read_text())
    assert found["on"]["processes"] == 2

    from transformers import set_seed

    set_seed(0)
    train, tests = recipe.data.made_up()
    run = recipe.argparse.Namespace(smoke=True, dtype="float32", new_tokens=8)
    model, tokenizer = recipe.loaded(run, recipe.data.drawn(train, 64))
    tokengate.load(model, tmp_path / "lora-on-0" / "adapter")
    monkeypatch.setattr(recipe.data.Task, "answer", answer_by_length)
    total = collections.Counter()
    for name, rows in tests.items():
        rows = recipe.data.drawn(rows, 8)
        answers, report = recipe.evaluate(model, tokenizer, name, rows, 3, 0)
        assert found["answers"][name] == answers
        assert found["scores"][name] == 100 * answers["right"] / 8
        assert found["reports"][name] == json.loads(json.dumps(report.to_dict()))
        total += answers
    assert min(total.values()) > 0
    assert len(total) == 3
    assert len(set(found["sparsity"].values())) == 8


def test_speed_is_counted_without_the_first_step(recipe, monkeypatch):
    speed = recipe.Speed()
    clock = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr(recipe.time, "perf_counter", lambda: next(clock))
    seen = []
    for tokens in (1000, 1300, 2000):
        speed.on_step_end(None, recipe.argparse.Namespace(num_input_tokens_seen=tokens), None)
        seen.append(speed.tokens_per_second())
    assert seen == [None, 150.0, 200.0]
