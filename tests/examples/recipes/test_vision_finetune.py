"""The vision recipe: pictures are read in each form, and its runs go through offline."""

import gzip
import importlib
import io
import json
import struct
import sys
import tarfile

import numpy as np
import pytest
import torch
from places import RECIPES, SHARED

for needed in ("timm", "transformers", "sklearn", "matplotlib"):
    pytest.importorskip(needed, reason="the examples extra is not installed")
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

DATA = SHARED / "vision"
needs_data = pytest.mark.skipif(
    not DATA.exists(), reason="the real files lie beside the project, not in it"
)


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    module = importlib.import_module("vision_data")
    module.load.cache_clear()
    return module


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("vision_finetune")


def started(example, monkeypatch, *line):
    monkeypatch.setattr(sys, "argv", ["vision_finetune.py", *map(str, line)])
    example.main()


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def up(tensors):
    """LoRA's B, which begin with zeros."""
    names = [name for name in tensors if name.endswith(".B")]
    assert len(names) == 2 * 4
    return names


def png(level):
    file = io.BytesIO()
    Image.new("L", (5, 4), level).save(file, "png")
    return file.getvalue()


# Two classes to train on, of three pictures, and one to test on of each.
FILES = {
    "train/cat/a.png": 10,
    "train/cat/b.PNG": 20,
    "train/dog/a.png": 30,
    "test/cat/c.png": 40,
    "test/dog/c.png": 50,
}


def levels(rows):
    """The grey level of each picture of one colour, and its class."""
    found = []
    for picture, label in rows:
        file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
        found.append((Image.open(file).getpixel((0, 0)), label))
    return sorted(found)


def written(folder, files):
    for name, level in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(level))


@pytest.mark.parametrize("form", ["folder", "tar", "tar.xz"])
@pytest.mark.parametrize("part", ["test", "val"])
def test_pictures_in_folders_of_classes_and_in_an_archive_of_them(data, tmp_path, form, part):
    files = {name.replace("test/", f"{part}/"): level for name, level in FILES.items()}
    if form == "folder":
        written(tmp_path / "pets", files)
        (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("no picture")
    else:
        (tmp_path / "pets").mkdir()
        mode = "w:xz" if form == "tar.xz" else "w"
        with tarfile.open(tmp_path / "pets" / f"all.{form}", mode) as archive:
            for name, level in files.items():
                member = tarfile.TarInfo(f"./{name}")
                content = png(level)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    train, held_out, classes = data.load("pets", tmp_path)
    assert classes == ["cat", "dog"]
    assert levels(train) == [(10, 0), (20, 0), (30, 1)]
    assert levels(held_out) == [(40, 0), (50, 1)]


def test_a_test_part_comes_before_val(data, tmp_path):
    written(tmp_path / "pets", {**FILES, "val/cat/d.png": 60})
    assert levels(data.load("pets", tmp_path)[1]) == [(40, 0), (50, 1)]


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(data, tmp_path, packed):
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    for part, labels in (("train", [7, 2]), ("t10k", [2, 7])):
        for kind, content in (
            ("images-idx3", struct.pack(">4b3i", 0, 0, 8, 3, 2, 3, 4) + pixels.tobytes()),
            ("labels-idx1", struct.pack(">4bi", 0, 0, 8, 1, 2) + bytes(labels)),
        ):
            file = tmp_path / "mnist" / f"{part}-{kind}-ubyte{'.gz' * packed}"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(gzip.compress(content) if packed else content)
    train, held_out, classes = data.load("mnist", tmp_path)
    assert classes == ["2", "7"]
    # Sorted by the class: the picture that begins with 12 is the train part's 2, the test's 7.
    assert [(p[0, 0], label) for p, label in sorted(train, key=lambda r: r[1])] == [(12, 0), (0, 1)]
    first, second = sorted(held_out, key=lambda row: row[1])
    assert (first[0] == pixels[0]).all()
    assert (second[0] == pixels[1]).all()


def test_settings_are_chosen_on_a_part_that_is_neither_trained_nor_tested_on(data):
    everything, test, classes = data.load("digits")
    train, validation, _ = data.load("digits", validation=True)
    assert (len(everything), len(test)) == (1297, 500)
    assert (len(train), len(validation)) == (1168, 129)
    assert classes == list("0123456789")

    def plain(rows):
        return sorted((picture.tobytes(), label) for picture, label in rows)

    assert plain(train + validation) == plain(everything) != plain(test)
    few, same, _ = data.load("digits", count=50)
    assert plain(few) == plain(everything[:50])
    assert plain(same) == plain(test)


def test_every_picture_has_three_colours(data):
    seen = []
    rows = [(np.full((2, 3), 9, np.uint8), 4), (png(7), 1)]
    pictures = data.Pictures(rows, lambda image: seen.append(image) or torch.zeros(1))
    assert (pictures[0]["labels"], pictures[1]["labels"], len(pictures)) == (4, 1, 2)
    assert [(image.size, image.getpixel((0, 0))) for image in seen] == [
        ((3, 2), (9, 9, 9)),
        ((5, 4), (7, 7, 7)),
    ]


def test_what_cannot_be_read_is_said_at_once(data, tmp_path):
    with pytest.raises(SystemExit, match="pass --data, the folder that has flowers/"):
        data.load("flowers")
    written(tmp_path / "pets", {"train/cat/a.png": 1, "other/cat/a.png": 1})
    with pytest.raises(SystemExit, match=r"pictures in \['other', 'train'\]: put them as train/"):
        data.load("pets", tmp_path)
    with pytest.raises(SystemExit, match="pictures in no part"):
        data.load("birds", tmp_path)
    written(tmp_path / "fish", {"train/cod/a.png": 1, "val/eel/a.png": 1})
    with pytest.raises(SystemExit, match="pictures of eel to be tested on, but none to train on"):
        data.load("fish", tmp_path)


def test_a_backbone_gives_a_loss_and_logits(example):
    model = example.Classifier(torch.nn.Linear(2, 3))
    pictures, labels = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    found = model(pictures, labels)
    assert torch.equal(found["logits"], model.backbone(pictures))
    chosen = found["logits"].log_softmax(-1)[range(5), labels]
    torch.testing.assert_close(found["loss"], -chosen.mean())


def test_it_runs_without_any_file_and_once(example, monkeypatch, tmp_path, capsys):
    line = ["--smoke", "--gate", "off", "0.5", "--output", tmp_path]
    started(example, monkeypatch, *line)
    first = capsys.readouterr().out
    assert "LoRA_S 0.5" in first
    gated = json.loads((tmp_path / "digits-lora-0.5-0" / "results.json").read_text())
    assert 0 < gated["sparsity"]["digits"] < 100
    assert 0 <= gated["pretrained"] <= 100
    assert len(gated["report"]["modules"]) == 2 * 4
    assert (tmp_path / "digits-lora-0.5-0" / "patches.png").exists()
    assert not (tmp_path / "digits-lora-off-0" / "patches.png").exists()
    # Neither the runs nor what the backbone was trained on are done again.
    monkeypatch.setattr(example.recipe, "fit", None)
    monkeypatch.setattr(example, "Trainer", None)
    started(example, monkeypatch, *line)
    assert capsys.readouterr().out.splitlines()[-6:] == first.splitlines()[-6:]


def test_a_backbone_that_is_read_gives_what_the_one_just_trained_gave(
    example, monkeypatch, tmp_path
):
    line = ["--smoke", "--epochs", 1, "--gate", "off", "--output", tmp_path]
    started(example, monkeypatch, *line)
    trained = adapter(tmp_path / "digits-lora-off-0")
    (tmp_path / "digits-lora-off-0" / "results.json").unlink()
    monkeypatch.setattr(example, "Trainer", None)
    started(example, monkeypatch, *line, "--seed", 0, 1)
    again, other = (adapter(tmp_path / f"digits-lora-off-{seed}") for seed in (0, 1))
    assert trained.keys() == again.keys() == other.keys()
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert not any(torch.equal(trained[name], other[name]) for name in trained)
    assert all(trained[name].any() for name in up(trained))


def test_what_settings_are_chosen_on_is_new_to_the_backbone(example, monkeypatch, tmp_path):
    asked = []
    load = example.vision_data.load

    def noted(name, folder, validation, count):
        asked.append((name, validation))
        return load("digits", None, validation, count)

    class Stopped(Exception):
        pass

    def trainer(*args, **options):
        raise Stopped

    monkeypatch.setattr(example.vision_data, "load", noted)
    monkeypatch.setattr(example, "Trainer", trainer)
    line = ["--smoke", "--gate", "off", "--validation", "--data", tmp_path, "--pretrain-on", "a"]
    for task in ("a", "b"):
        with pytest.raises(Stopped):
            started(example, monkeypatch, *line, "--task", task, "--output", tmp_path / task)
    assert asked == [("a", True), ("a", False)]


def test_frozen_trains_the_head_alone(example, monkeypatch, tmp_path):
    line = ["--smoke", "--epochs", 1, "--gate", "off", "--frozen", "--output", tmp_path]
    started(example, monkeypatch, *line)
    frozen = adapter(tmp_path / "digits-lora-off-0")
    assert not any(frozen[name].any() for name in up(frozen))
    (head,) = (name for name in frozen if name.endswith("head.bias"))
    assert frozen[head].any()  # timm begins with zeros


def test_a_model_of_timm(example, monkeypatch, tmp_path):
    create, asked = example.timm.create_model, []

    def untrained(name, pretrained, **options):
        asked.append((name, pretrained, options))
        return create(name, embed_dim=32, depth=1, num_heads=2, **options)

    monkeypatch.setattr(example.timm, "create_model", untrained)
    line = ["--smoke", "--epochs", 1, "--model", "vit_tiny_patch16_224", "--pixels", 32]
    started(example, monkeypatch, *line, "--gate", "off", "--output", tmp_path)
    assert asked == [("vit_tiny_patch16_224", True, {"img_size": 32})]
    found = json.loads((tmp_path / "digits-lora-off-0" / "results.json").read_text())
    assert found["pretrained"] is None
    assert not (tmp_path / "pretrained").exists()


@needs_data
def test_the_real_files_have_as_many_pictures_as_their_authors_say(data):
    for name, count in (("fashion-mnist", 60000), ("cifar10-jpg", 50000)):
        train, held_out, classes = data.load(name, DATA)
        assert (len(train), len(held_out), len(classes)) == (count, 10000, 10)
        for rows, each in ((train, count // 10), (held_out, 1000)):
            assert np.bincount([label for _, label in rows]).tolist() == [each] * 10


@needs_data
def test_it_runs_on_real_rows(example, monkeypatch, tmp_path):
    task = source = "fashion-mnist"
    line = ["--smoke", "--epochs", 1, "--gate", "off", "--method", "dora", "--output", tmp_path]
    started(example, monkeypatch, *line, "--data", DATA, "--task", task, "--pretrain-on", source)
    found = json.loads((tmp_path / f"{task}-dora-off-0" / "results.json").read_text())
    assert list(found["scores"]) == [task]
    assert (tmp_path / "pretrained" / f"{source}-28-2-smoke.pt").exists()
