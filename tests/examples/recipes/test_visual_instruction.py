"""The LLaVA recipe: what is asked and learnt, how answers are read, and that it runs."""

import argparse
import importlib
import io
import json
import lzma
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from places import RECIPES, SHARED
from recipe_runs import ranked
from two_ranks import start, wait_for

pytest.importorskip("transformers", reason="the examples extra is not installed")
pytest.importorskip("sklearn", reason="the examples extra is not installed")
from PIL import Image

DATA = SHARED / "vqa"
NAMES = ("recipe", "recipe_results", "visual_data", "visual_instruction")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
real = pytest.mark.skipif(
    not DATA.exists(), reason="the real files lie beside the project, not in it"
)


@pytest.fixture(scope="module")
def visual():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("visual_instruction")
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(visual):
    return visual.visual_data


@pytest.fixture(scope="module")
def processor(visual, data):
    return visual.tiny(data.made_up()[0])[1]


def png(size=(4, 4), colour="red"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def test_the_prompt_is_llavas(data):
    row = data.Row(("What?", "A dog.", "Red?", "no"), png())
    text, spans = data.prompt(row, "</s>")
    assert text == (
        SYSTEM + "USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Red? ASSISTANT: no</s>"
    )
    assert [text[a:b] for a, b in spans] == [" A dog.</s>", " no</s>"]
    assert data.question(row) == SYSTEM + "USER: <image>\nWhat? ASSISTANT:"
    assert data.question(data.Row(("What?", "A dog."))) == SYSTEM + "USER: What? ASSISTANT:"


def test_the_loss_is_on_the_answers_alone(visual, data, processor):
    train, _ = data.made_up()
    # With and without a picture, of one turn and of two, and so padded: the ids must not shift.
    rows = [train[0], train[1], train[-1]]
    assert [len(row.turns) for row in rows] == [4, 2, 2]
    assert [row.image is None for row in rows] == [False, False, True]
    batch = visual.collate(processor, rows)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    assert batch["pixel_values"].shape[0] == 2
    marks = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert marks.tolist() == [4, 4, 0]
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        learnt = labels != -100
        assert 0 < learnt.sum() < len(ids)
        assert labels[learnt].tolist() == ids[learnt].tolist()
        said = processor.tokenizer.decode(labels[learnt]).split("</s>")
        assert [answer.strip() for answer in said] == [*row.turns[1::2], ""]


def test_questions_end_where_the_answer_begins(visual, data, processor):
    train, _ = data.made_up()
    batch = visual.collate(processor, [train[0], train[-1]], train=False)
    assert "labels" not in batch
    for row, ids in zip((train[0], train[-1]), batch["input_ids"], strict=True):
        text = processor.tokenizer.decode(ids)
        assert text.endswith("ASSISTANT:")
        assert row.turns[0].replace("\n", " ") in text.replace("\n", " ")
    # Generation goes on at the end, so the padding is before.
    assert batch["attention_mask"][1][0] == 0
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]


def test_rows_without_any_picture_are_a_batch_too(visual, data):
    train, _ = data.made_up()
    model, processor = visual.tiny(train)
    batch = visual.collate(processor, train[-2:])
    assert "pixel_values" not in batch
    assert model(**batch).loss.isfinite()


def test_a_picture_becomes_a_square_in_colour(data):
    file = io.BytesIO()
    Image.new("L", (2, 6), 200).save(file, "PNG")
    square = data.picture(data.Row((), file.getvalue()), (1, 2, 3))
    assert (square.size, square.mode) == ((6, 6), "RGB")
    assert [square.getpixel((x, 3)) for x in range(6)] == [
        (1, 2, 3), (1, 2, 3), (200,) * 3, (200,) * 3, (1, 2, 3), (1, 2, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. because", "B"),
        ("B\nbecause", "B"),
        ("The answer is B.", "B"),
        ("I think. The answer is B", "B"),
        ("A dog", None),  # an article, no letter
        ("F", None),
        ("Because", None),
        ("", None),
    ],
)
def test_a_letter_is_read_as_llava_reads_it(data, text, read):
    assert data.letter(text) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("No", "no"),
        ("no", "no"),
        ("No, there is", "no"),
        ("There is not a car. Yes", "no"),
        ("Yes. There is no car", "yes"),  # the first sentence counts
        ("Nothing", "yes"),  # whole words
        ("", "yes"),  # POPE's authors have it so
    ],
)
def test_yes_and_no_are_read_as_pope_reads_them(data, text, read):
    assert data.yes_or_no(text) == read


def test_scores_by_hand(data):
    rows = [data.Row(("q", answer)) for answer in ("A", "B", "C", "A")]
    found = data.score(data.Test(rows, letters=True), ["A", "B. so", "A", "no"])
    assert found == {"accuracy": 0.5}
    # One of two yes found and one false alarm: precision and recall are 1/2. Then all is right.
    rows = [data.Row(("q", a), part="x") for a in ("yes", "yes", "no", "no")]
    rows += [data.Row(("q", a), part="y") for a in ("yes", "no", "no", "no")]
    given = ["Yes", "No", "yes", "no", "yes", "no", "no", "no"]
    assert data.score(data.Test(rows), given) == {
        "accuracy": 0.75, "f1": 0.75, "yes": 0.375,
        "accuracy, x": 0.5, "f1, x": 0.5, "yes, x": 0.5,
        "accuracy, y": 1.0, "f1, y": 1.0, "yes, y": 0.25,
    }  # fmt: skip


def test_llavas_training_format(data, tmp_path):
    said = [
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "A dog."},
    ]
    rows = data.conversations(
        [
            {"id": "1", "image": "a/b.png", "conversations": said},
            {"id": "2", "conversations": said[1:]},
        ],
        tmp_path,
    )
    assert rows == [
        data.Row(("What is it?", "A dog."), tmp_path / "a/b.png"),
        data.Row(("What is it?", "A dog.")),
    ]
    with pytest.raises(SystemExit, match=r"conversation 3 is of human, human: .* take turns"):
        data.conversations([{"id": "3", "conversations": [said[1]] * 2}], tmp_path)
    with pytest.raises(SystemExit, match="conversation 4 is of human: "):
        data.conversations([{"id": "4", "conversations": [said[1]]}], tmp_path)


@pytest.fixture
def folder(tmp_path):
    """A picture of each test and of the conversations, of which others lack."""
    for file in ("pope/val2014/1.jpg", "scienceqa/images/test/5/image.png", "own/pictures/p.png"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(png())
    for part in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": 1, "image": "1.jpg", "text": f"A {part} car?", "label": "yes"},
            {"question_id": 2, "image": "2.jpg", "text": "A dog?", "label": "no"},
        ]
        packed = lzma.compress("\n".join(map(json.dumps, lines)).encode())
        (tmp_path / f"pope/coco_pope_{part}.json.xz").write_bytes(packed)
    said = [
        {"from": "human", "value": "<image>\nWhich?\nA. a\nB. b"},
        {"from": "gpt", "value": "B"},
    ]
    sqa = [
        {"id": "4", "conversations": said},
        {"id": "5", "image": "5/image.png", "conversations": said},
        {"id": "6", "image": "6/image.png", "conversations": said},
    ]
    (tmp_path / "scienceqa/llava_test_CQM-A.json").write_text(json.dumps(sqa))
    own = [{"id": "1", "image": "p.png", "conversations": said}]
    (tmp_path / "own/train.json").write_text(json.dumps(own))
    return tmp_path


def test_the_tests_have_the_questions_whose_picture_there_is(data, folder):
    own = folder / "own"
    train, tests = data.load(folder, own / "train.json", own / "pictures")
    assert train == [data.Row(("Which?\nA. a\nB. b", "B"), own / "pictures/p.png")]
    assert list(tests) == ["SQA", "POPE"]
    asked = "Which?\nA. a\nB. b\nAnswer with the option's letter from the given choices directly."
    image = folder / "scienceqa/images/test/5/image.png"
    assert tests["SQA"] == data.Test([data.Row((asked, "B"), image)], letters=True, asked=2)
    assert [(row.turns, row.part) for row in tests["POPE"].rows] == [
        ((f"A {part} car?\nAnswer the question using a single word or phrase.", "yes"), part)
        for part in ("random", "popular", "adversarial")
    ]
    assert (tests["POPE"].asked, tests["POPE"].metric) == (6, "f1")
    with pytest.raises(SystemExit, match="has no training rows: "):
        data.load(folder)
    (folder / "none").mkdir()
    with pytest.raises(SystemExit, match="has no test: "):
        data.load(folder / "none", own / "train.json")


def test_a_test_without_pictures_is_said_to_be_left_out(visual, data, monkeypatch, capsys):
    train, tests = data.made_up()
    lacks = data.Test([], metric="f1", asked=6)
    monkeypatch.setattr(data, "load", lambda *args: (train, {"SQA": tests["SQA"], "POPE": lacks}))
    monkeypatch.setattr(visual, "pretrained", lambda run: visual.tiny(train))
    trainer = argparse.Namespace(
        state=argparse.Namespace(log_history=[]), model=torch.nn.Identity()
    )
    monkeypatch.setattr(visual.recipe, "fit", lambda *args, **options: trainer)
    report = argparse.Namespace(sparsity=0.5, to_dict=dict)
    rec = argparse.Namespace(
        report=lambda **options: report,
        reports=lambda **options: {"image": report, "text": report},
    )
    monkeypatch.setattr(visual, "ask", lambda t, p, rows, n: (["A"] * len(rows), rec))
    monkeypatch.setattr(visual, "drifts", lambda *args: {})
    monkeypatch.setattr(sys, "argv", ["visual_instruction.py", "--data", "d", "--rank", "2"])
    monkeypatch.setattr(visual.recipe, "main", lambda runs, perform: kept.append(perform(runs[0])))
    kept = []
    visual.main()
    assert list(kept[0]["scores"]) == ["SQA"]
    assert "POPE: 0 of 6 questions, whose pictures there are\n" in capsys.readouterr().out


def test_conversations_about_pictures_that_lack_are_refused(data, folder):
    with pytest.raises(SystemExit, match="1 of 1 conversations are about pictures that are not in"):
        data.load(folder, folder / "own/train.json")
    (folder / "easy-vqa/train").mkdir(parents=True)
    (folder / "easy-vqa/test").mkdir()
    for part in ("train", "test"):
        (folder / f"easy-vqa/{part}/questions.json").write_text('[["red?", "yes", 0]]')
    with pytest.raises(SystemExit, match=r"1 of 1 conversations are .* not in .*easy-vqa: "):
        data.load(folder)


@pytest.fixture(scope="module")
def real_rows(data):
    """Read once: they are packed."""
    return data.load(DATA)


@real
def test_the_real_files_have_as_many_rows_as_their_authors_say(data, real_rows):
    train, tests = real_rows
    # POPE is there without its pictures.
    assert [(name, bool(test.rows)) for name, test in tests.items()] == [
        ("SQA", True), ("POPE", False), ("easy-VQA", True),
    ]  # fmt: skip
    assert tests["POPE"].asked == 9000
    sqa = tests["SQA"]
    assert (len(sqa.rows), sqa.asked) == (388, 2017)
    letters = Counter(row.turns[1] for row in sqa.rows)
    assert letters == {"A": 137, "B": 147, "C": 72, "D": 26, "E": 6}
    assert len(tests["easy-VQA"].rows) == 7136
    assert len(train) == 4000
    assert sum(len(row.turns) // 2 for row in train) == 38575


def smoke(visual, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", ["visual_instruction.py", "--smoke", *map(str, more)])
    visual.main()


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_smoke_and_two_processes_answer_alike(
    visual, data, monkeypatch, tmp_path, capsys, processes
):
    few = ["--rows", "16", "--epochs", "2", "--lr", "0.1", "--gate", "off", "on"]
    smoke(visual, monkeypatch, *few, "--output", tmp_path / "one")
    table = (tmp_path / "one/table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [line.split(" | ")[0] for line in table.splitlines()]
    assert rows[2:] == [
        "| LoRA", "| drift", "| drift of 0.8 M(x)", "| LoRA_S", "| drift", "| drift of 0.8 M(x)",
        "| sparsity (%)", "| sparsity of image (%)", "| sparsity of text (%)", "| LoRA_S - LoRA",
    ]  # fmt: skip

    found = read(tmp_path / "one/lora-on-0")
    assert 0 < found["sparsity"]["SQA"] < 100
    assert found["sparsity of image"] != found["sparsity of text"]
    # The questions are counted, each once, and no answer.
    train, tests = data.made_up()
    _, processor = visual.tiny(train[:16])
    for name, test in tests.items():
        batch = visual.collate(processor, test.rows, train=False)
        images = int((batch["input_ids"] == processor.image_token_id).sum())
        asked = {
            "all": int(batch["attention_mask"].sum()), "image": images,
            "text": int(batch["attention_mask"].sum()) - images,
        }  # fmt: skip
        assert images == 4 * 8
        for group, report in found["reports"][name].items():
            assert {m["positions"] for m in report["modules"].values()} == {asked[group]}

    # Done once, and never again.
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "one").rglob("results.json")}
    assert len(before) == 2
    smoke(visual, monkeypatch, *few, "--output", tmp_path / "one")
    assert {f: f.stat().st_mtime_ns for f in before} == before

    arguments = ["--smoke", *few, "--output", tmp_path / "two"]
    wait_for(start(processes, ranked, "visual_instruction.py", arguments))
    for gate in ("off", "on"):
        one, two = (read(tmp_path / each / f"lora-{gate}-0") for each in ("one", "two"))
        assert (one["on"]["processes"], two["on"]["processes"]) == (1, 2)
        for kept in ("answers", "scores", "metrics"):
            assert one[kept] == two[kept]
        for kept in ("sparsity", "sparsity of image", "sparsity of text"):
            assert two[kept] == pytest.approx(one[kept], abs=0.5)


@real
def test_smoke_with_real_rows_and_all_parts(visual, data, real_rows, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "load", lambda folder, *_: real_rows if folder == DATA else None)
    smoke(
        visual, monkeypatch, "--data", DATA, "--gate", "on", "--rows", "8", "--method", "dora",
        "--epochs", "1",
        "--parts", "vision", "projector", "language", "--output", tmp_path,
    )  # fmt: skip
    found = read(tmp_path / "dora-on-0")
    assert list(found["scores"]) == ["SQA", "easy-VQA"]
    assert found["metrics"]["SQA"]["of"] == 2017
    assert len(found["answers"]["easy-VQA"]) == 16
    modules = found["reports"]["SQA"]["all"]["modules"]
    # Of the vision tower's three layers the last is not used (vision_feature_layer=-2).
    assert Counter(name.split(".")[1] for name in modules) == {
        "vision_tower": 2 * 6, "multi_modal_projector": 2, "language_model": 2 * 7,
    }  # fmt: skip


def test_nothing_begins_without_data(visual, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["visual_instruction.py"])
    with pytest.raises(SystemExit):
        visual.main()
    assert "--data is needed, or --smoke or --plan" in capsys.readouterr().err


def test_the_settings_are_those_of_tables_2_and_7(visual, monkeypatch):
    monkeypatch.setattr(visual.recipe, "main", lambda runs, perform: found.extend(runs))
    found = []
    line = "--data d --method lora dora adalora --gate on"
    monkeypatch.setattr(sys, "argv", ["visual_instruction.py", *line.split()])
    visual.main()
    assert [(run.method, run.penalty) for run in found] == [
        ("lora", 2e-6), ("dora", 1e-6), ("adalora", 5e-7),
    ]  # fmt: skip
    for run in found:
        assert (run.rank, run.scale, run.dropout, run.lr) == (128, 0.5, 0.05, 2e-4)
        assert (run.scheduler, run.batch_size, run.epochs, run.s) == ("cosine", 16, 1, 4e-5)


def test_pictures_are_opened_when_they_are_needed(visual, data, processor, folder):
    # A training set of many thousands does not fit into memory.
    train, _ = data.load(folder, folder / "own/train.json", folder / "own/pictures")
    collate = partial(visual.collate, processor)
    assert collate(train)["pixel_values"].shape == (1, 3, 32, 32)
    train[0].image.unlink()
    with pytest.raises(FileNotFoundError):
        collate(train)
