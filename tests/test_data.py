import os, pickle, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adabatch import data
from adabatch.data import draw_epoch, load_data
from adabatch.files import lock

CLASSES = [f"class{k}" for k in range(10)]

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "CIFAR-10 as class folders, with two training images and one test image a class."
    monkeypatch.setattr(data, "CIFAR_SIZES", {"train": 20, "test": 10})
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for name in CLASSES:
            folder = tmp_path / "cifar10" / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return tmp_path

def test_class_folders_are_decoded_once(tiny, monkeypatch):
    first = load_data("cifar10", tiny)
    assert (first.train_size, first.test_size, first.classes) == (20, 10, 10)
    assert first.labels.tolist() == [k // 2 for k in range(20)]
    image = np.asarray(Image.open(tiny / "cifar10/train/class3/1.png")).transpose(2, 0, 1)
    assert (first.crops[7, 4, 4].permute(2, 0, 1).numpy() == image).all()
    monkeypatch.setattr(data, "_pixels", None)  # would fail if an image were decoded again
    again = load_data("cifar10", tiny)
    assert torch.equal(first.crops, again.crops) and torch.equal(first.test[0], again.test[0])
    one, two = ((images.crops.stride(), images.test[0].stride()) for images in (first, again))
    assert one == two  # in another layout sums come out otherwise

def test_the_cache_is_made_again_when_a_file_changes_or_it_is_damaged(tiny):
    load_data("cifar10", tiny)
    Image.new("RGB", (32, 32), "white").save(tiny / "cifar10/train/class0/0.png")
    assert (load_data("cifar10", tiny).crops[0, 4, 4] == 255).all()
    (tiny / "cifar10.cache.npz").write_bytes(b"torn")
    assert (load_data("cifar10", tiny).crops[0, 4, 4] == 255).all()

def test_torchvisions_files(tiny, monkeypatch):
    expected = load_data("cifar10", tiny)
    base = tiny / "cifar-10-batches-py"
    base.mkdir()
    images = expected.crops[:, 4, 4].permute(0, 3, 1, 2).reshape(20, -1).numpy()
    batches = {f"data_batch_{k + 1}": (images[4 * k : 4 * k + 4], expected.labels[4 * k : 4 * k + 4]) for k in range(5)}
    batches["test_batch"] = expected.test[0].reshape(10, -1).numpy(), expected.test[1]
    for name, (pixels, labels) in batches.items():
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels.tolist()}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged"):
        load_data("cifar10", tiny)  # its checksums are not CIFAR's
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    shutil.rmtree(tiny / "cifar10")
    found = load_data("cifar10", tiny)
    assert torch.equal(found.crops, expected.crops) and torch.equal(found.labels, expected.labels)

def test_what_is_wrong_is_named_and_nothing_is_written(tiny):
    whole, broken = tiny / "cifar10", tiny / "broken/cifar10"
    def image(name, mode="RGB", size=(32, 32)): return lambda: Image.new(mode, size).save(broken / name)
    for harm, line in (
        (lambda: shutil.rmtree(broken / "test"), "test is missing: the data set is incomplete"),
        (lambda: shutil.rmtree(broken / "train/class9"), "train holds 9 of 10 classes"),
        (lambda: (broken / "test/class3").rename(broken / "test/others"), "test lacks the class class3"),
        ((broken / "train/class4/1.png").unlink, "train holds 19 of 20 images"),
        (lambda: os.truncate(broken / "test/class4/0.png", 900), "class4/0.png is damaged"),
        (image("train/class2/0.png", size=(31, 32)), "class2/0.png is RGB of 31x32 pixels, not RGB of 32x32"),
        (image("train/class2/0.png", "L"), "class2/0.png is L of 32x32"),
    ):
        shutil.copytree(whole, broken)
        harm()
        with pytest.raises(ValueError, match=line): load_data("cifar10", broken.parent)
        assert [p.name for p in broken.parent.iterdir()] == ["cifar10"]
        shutil.rmtree(broken)

def test_no_network(tmp_path, monkeypatch):
    def download(*args, **kwargs): raise OSError("no network")
    monkeypatch.setattr("torchvision.datasets.CIFAR10", download)
    line = r"could not be downloaded \(no network\): put it there, as torchvision's cifar-10-batches-py/ or"
    with pytest.raises(ValueError, match=line): load_data("cifar10", tmp_path / "absent")
    assert not (tmp_path / "absent").exists()

def test_a_cache_that_another_process_writes_is_left_to_it(tiny, capsys):
    with lock(tiny / "cifar10.cache.npz"): assert load_data("cifar10", tiny).train_size == 20
    assert [p.name for p in tiny.iterdir()] == ["cifar10"] and capsys.readouterr().err == ""
    load_data("cifar10", tiny)
    assert sorted(p.name for p in tiny.iterdir()) == ["cifar10", "cifar10.cache.npz"]

def test_a_cache_that_cannot_be_written(tiny, monkeypatch, capsys):
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez", full)
    assert load_data("cifar10", tiny).train_size == 20
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "cifar10.cache.npz could not be written" in note and "No space left" in note
    assert [p.name for p in tiny.iterdir()] == ["cifar10"]

@pytest.mark.parametrize("other", [None, "faster", "under way"])
def test_a_download_is_there_whole_whatever_another_process_does(tmp_path, monkeypatch, other):
    def download(folder, download):
        files = tmp_path / "sample", Path(folder) / "cifar-10-batches-py"
        shutil.copytree(*files)
        if other == "faster": shutil.copytree(files[0], tmp_path / "data/cifar-10-batches-py")
        if other == "under way": (tmp_path / "data/.cifar-10-batches-py.theirs").mkdir(parents=True)
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample/batches.meta").write_text("whole")
    monkeypatch.setattr(data, "_torchvision", lambda name: download)
    data._download("cifar10", tmp_path / "data")
    found = sorted(p.name for p in (tmp_path / "data").iterdir())
    theirs = [".cifar-10-batches-py.theirs"] if other == "under way" else []
    assert found == [*theirs, "cifar-10-batches-py"]
    assert (tmp_path / "data/cifar-10-batches-py/batches.meta").read_text() == "whole"

def test_epochs_depend_on_seed_and_number_alone():
    a, b = draw_epoch(100, 1, 2), draw_epoch(100, 1, 2)
    assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("order", "crop", "flip"))
    for seed, number in ((1, 3), (2, 2), (2, 1)): assert not torch.equal(a.order, draw_epoch(100, seed, number).order)

def test_digits_are_not_mirrored_and_fake_has_cifars_shape():
    assert not load_data("digits").draw(0, 0).flip.any()
    fake = load_data("fake")
    assert fake.shape == (3, 32, 32) and fake.draw(0, 0).flip.float().mean() == pytest.approx(0.5, abs=0.05)

def test_real_images(cifar10):
    images = load_data("cifar10", cifar10)
    assert (images.train_size, images.test_size) == (50_000, 10_000)
    assert images.labels.bincount().tolist() == [5000] * 10
    pixels = images.crops[:, 4, 4].double().mean((0, 1, 2)) / 255
    assert pixels.tolist() == pytest.approx(data.CIFAR_MEAN, abs=2e-4)
