"""Images streamed from folders: whoever reads them and whatever is sent, the same batches; whatever is wrong, named."""

import os, random, shutil, signal, struct, subprocess, sys, zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import flags, papermill, program
from test_crash import children, wait_for_file, wait_until_free
from torchvision.transforms import RandomResizedCrop

from adabatch import data, record, train
from adabatch.data import Folder, class_folders, draw_crop, load_data, read_ahead
from adabatch.experiment import Experiment, resolve, training_samples
from adabatch.files import load_checkpoint
from adabatch.loader import shard
from adabatch.schedule import fixed
from adabatch.train import main, run
from adabatch.trainer import Trainer

CLASSES = [f"class{k}" for k in range(6)]
SHORT = dict(model="alexnet_imagenet", batch_size=4, max_batch_size=8, epochs=2, every=1, device="cpu")

def network(name, classes):
    "A small network for images of any size; always the same initial weights."
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, classes))

def write_images(folder, train=4, val=2, size=(24, 60)):
    "Class folders of noise: colour, grey and CMYK, several sizes, one of them a PNG by another name."
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for k in range(len(CLASSES) * count):
            path = folder / split / CLASSES[k % len(CLASSES)] / f"{k}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (*rng.integers(*size, 2), 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert(("RGB", "L", "CMYK")[k % 7 % 3])
            image.save(path, "PNG" if k == 3 else "JPEG")
    return folder

@pytest.fixture
def folder(tmp_path): return write_images(tmp_path / "images")

@pytest.fixture
def tiny_network(monkeypatch): monkeypatch.setattr(train, "get_model", network)

# --- the same, whoever reads

@pytest.mark.parametrize("workers, chunk", [(0, 5), (1, 16), (3, 1), (3, 4)])
def test_batches_depend_on_seed_and_epoch_alone(folder, workers, chunk):
    whole, other = Folder(folder, workers=0, size=32), Folder(folder, workers=workers, size=32)
    other.train.chunk = other.test.chunk = chunk
    before = None
    for number in (0, 1):
        epoch = whole.draw(7, number)
        x, y = next(whole.train_batches(epoch, [(0, 24)]))
        parts = [shard((0, 24), rank, 3) for rank in range(3)]  # as three processes would read them
        again = [next(other.train_batches(other.draw(7, number), [part])) for part in parts]
        assert torch.equal(x, torch.cat([x for x, _ in again])) and torch.equal(y, torch.cat([y for _, y in again]))
        files = [Path(os.fsdecode(whole.train.squares.paths[i])) for i in epoch.order]
        assert y.tolist() == [CLASSES.index(file.parent.name) for file in files]
        now = x[epoch.order.argsort()], [w.pid for w in other.train.loader._iterator._workers] if workers else []
        if before: assert not torch.equal(now[0], before[0]) and now[1] == before[1]  # other crops by the same workers
        before = now

def test_pixels_arrive_as_bytes_and_are_normalised_as_torchvision_does(folder):
    from torchvision import transforms
    streamed = Folder(folder, workers=0, size=32)
    (images, labels), x = streamed.test.squares.__getitems__([(5, None)]), next(streamed.test_batches([(5, 6)]))[0]
    assert images.dtype == torch.uint8 and images.shape == (1, 32, 32, 3) and labels.tolist() == [2]
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    usual = transforms.Compose([transforms.ToTensor(), normalise])
    assert torch.allclose(usual(images[0].numpy()), x[0], atol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last)

def test_the_record_is_the_same_with_any_workers_and_names_none(folder, tmp_path, tiny_network):
    e = Experiment(dataset=str(folder), output_dir=str(tmp_path / "0"), workers=0, **SHORT)
    alone, helped = run(e), run(replace(e, output_dir=str(tmp_path / "2"), workers=2))
    assert record.differences(alone, helped) == [] and "workers" not in alone.config
    assert record.differences(alone, run(replace(e, workers=1))) == []  # it is loaded
    assert training_samples(e) == 24 == alone.samples[0] + alone.left_out[0]

def test_a_long_image_is_cut_before_it_is_scaled(folder):
    Image.new("L", (3, 400_000)).save(folder / "val/class0/0.png")  # scaled whole: 256 x 34 million pixels
    x, _ = next(Folder(folder, workers=0).test_batches([(0, 1)]))
    assert x.shape == (1, 3, 224, 224)

# --- top-5

def test_the_top_5_error_is_kept_where_there_are_more_than_five_classes(folder, tmp_path, tiny_network, capsys):
    e = Experiment(dataset=str(folder), output_dir=str(tmp_path / "out"), workers=0, **SHORT)
    six = run(e)
    assert (six.test_error_top5 <= six.test_error).all() and f"(top-5 {six.test_error_top5[-1]:.2f} %)" in six.summary()
    assert "test_error_top5" in np.load(resolve(e).path).files
    assert main([*flags(output_dir=tmp_path / "out", dataset=folder, workers=0, **SHORT), "--evaluate"]) == 0
    errors = f"test error {six.test_error[-1]:.2f} % (top-5 {six.test_error_top5[-1]:.2f} %)"
    assert errors in capsys.readouterr().out
    command = flags(output_dir=tmp_path / "out", dataset=folder, workers=0, **SHORT | dict(momentum=0.5))
    assert main([*command, "--evaluate"]) == 2 and "made with other settings (momentum" in capsys.readouterr().err
    shutil.rmtree(folder / "train/class5")
    shutil.rmtree(folder / "val/class5")
    five = run(replace(e, overwrite=True))
    assert "test_error_top5" not in five.arrays and "top-5" not in five.summary()
    assert "test_error_top5" in record.differences(six, five)
    with pytest.raises(AttributeError): five.test_error_top5  # noqa: B018

def test_the_notebook_streams_the_folder_and_the_settings_that_papermill_names(folder, tmp_path):
    settings = dict(dataset=folder, batch_size=8, max_batch_size=16, epochs=2, every=1, device="cpu", workers=1)
    parameters = [part for name, value in settings.items() for part in ("-p", name, str(value))]
    done = subprocess.run([*papermill(tmp_path, "imagenet"), *parameters], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = record.load(tmp_path / "images/alexnet_imagenet/adabatch-8-16-epochs2-every1-seed0.npz")
    assert found.status == "complete" and found.batch_size.tolist() == [8, 16]

def test_top_5_counts_every_test_image_once(folder):
    class Fixed(torch.nn.Module):
        "Always ranks the classes 5, 4, 3, 2, 1, 0."
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
        def forward(self, x): return self.scale * torch.arange(6.0).expand(len(x), 6)
    from adabatch.trainer import cross_entropy, evaluate, percent_outside_top5, percent_wrong, Step
    step = Step(Fixed(), None, torch.device("cpu"), cross_entropy, percent_wrong)
    _, top1, top5 = evaluate(step, Folder(folder, workers=0, size=32), percent_outside_top5)
    assert (top1, top5) == (pytest.approx(500 / 6), pytest.approx(100 / 6))

# --- what is wrong

def header(width, height):
    "A PNG that says it is so large, and holds nothing."
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

UNREADABLE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-400]), "is damaged or no image (OSError): restore it"),
    "text": (lambda p: p.write_text("no image"), "is damaged or no image (UnidentifiedImageError): restore it"),
    "16 bits": (lambda p: Image.new("I;16", (60, 24), 999).save(p, "PNG"), "has more than 8 bits a channel"),
    "floats": (lambda p: Image.new("F", (60, 24), 0.5).save(p, "TIFF"), "has more than 8 bits a channel"),
    "empty": (lambda p: p.write_bytes(b""), "is damaged or no image (UnidentifiedImageError): restore it"),
    "gone": (lambda p: p.unlink(), "cannot be read (No such file or directory): restore it"),
    "100 megapixels": (lambda p: p.write_bytes(header(10_000, 10_000)), "has more than 89,478,485 pixels"),
    "1,000 megapixels": (lambda p: p.write_bytes(header(40_000, 25_000)), "has more than 89,478,485 pixels"),
}

@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("harm, line", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("split, workers", [("train", 0), ("val", 2)])
def test_an_image_that_cannot_be_read_is_named_in_one_line(folder, split, workers, harm, line):
    damaged, streamed = folder / split / "class2/8.JPEG", Folder(folder, workers=workers, size=32)
    harm(damaged)
    with pytest.raises(ValueError) as refused:
        if split == "train": list(streamed.train_batches(streamed.draw(0, 0), [(0, 24)]))
        else: list(streamed.test_batches([(0, 12)]))
    assert str(refused.value).startswith(f"{damaged} {line}") and "\n" not in str(refused.value)

def test_a_machine_without_memory_is_not_blamed_on_an_image(folder, monkeypatch):
    streamed = Folder(folder, workers=0, size=32)
    monkeypatch.setattr(Image.Image, "load", lambda image: bytes(2**62))
    with pytest.raises(MemoryError): next(streamed.test_batches([(0, 1)]))

def test_a_damaged_image_ends_a_run_in_one_line_and_when_restored_it_goes_on(folder, tmp_path, tiny_network, capfd):
    damaged = folder / "train/class2/8.JPEG"
    def command(name):
        return main(flags(output_dir=tmp_path / name, dataset=folder, workers=2, checkpoint_minutes=0, **SHORT))
    assert command("whole") == 0
    good = damaged.read_bytes()
    damaged.write_bytes(good[: len(good) // 2])
    capfd.readouterr()
    assert command("broken") == 2
    assert capfd.readouterr().err == f"error: {damaged} is damaged or no image (OSError): restore it\n"
    damaged.write_bytes(good)
    assert command("broken") == 0
    records = [record.load(next((tmp_path / name).rglob("*.npz"))) for name in ("whole", "broken")]
    assert record.differences(*records) == []

def test_a_checkpoint_of_another_training_set_is_refused(folder, tmp_path):
    def trainer():
        model = network("", 6)
        return Trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), Folder(folder, workers=0, size=32), plan)
    plan = fixed(4, lr=0.1, epochs=1)
    trainer().fit(tmp_path / "run.pt")
    (folder / "train/class2/8.JPEG").unlink()
    with pytest.raises(ValueError, match="has 23 samples, but had 24 when the checkpoint was written: restore it"):
        trainer().fit(tmp_path / "run.pt")

def flatten(folder):
    for path in folder.glob("val/*/*"): path.rename(folder / "val" / path.name)
    for path in folder.glob("val/class*"): path.rmdir()

STRUCTURE = {
    "no val": (lambda d: shutil.rmtree(d / "val"), "must hold class folders in train/ and in val/ or test/"),
    "no train": (lambda d: shutil.rmtree(d / "train"), "must hold class folders in train/ and in val/ or test/"),
    "empty train": (lambda d: (shutil.rmtree(d / "train"), (d / "train").mkdir()), "train holds no class folders"),
    "flat val": (flatten, "val holds no class folders: put its images into a folder for each class"),
    "empty class": (lambda d: [p.unlink() for p in d.glob("train/class2/*")], "train/class2 holds no images"),
    "no images": (lambda d: [p.rename(f"{p}.txt") for p in d.glob("val/class2/*")], "val/class2 holds no images"),
    "missing in val": (lambda d: shutil.rmtree(d / "val/class5"), "val lacks the class class5"),
    "missing in train": (lambda d: shutil.rmtree(d / "train/class0"), "train lacks the class class0"),
    "nested": (lambda d: (d / "train/class1/more").mkdir(), "train/class1/more is a folder in a class folder"),
    "circle of folders": (lambda d: (d / "train/round").symlink_to(d / "train"), "is a folder in a class folder"),
    "circular link": (lambda d: (d / "val/class1/x.jpg").symlink_to("x.jpg"), "val/class1/x.jpg is a broken link"),
    "dangling class": (lambda d: (d / "train/class9").symlink_to("nowhere"), "train/class9 is a broken link"),
}

@pytest.mark.parametrize("harm, line", STRUCTURE.values(), ids=STRUCTURE)
def test_a_folder_that_is_not_whole_is_refused_at_once(folder, tmp_path, harm, line, capsys):
    harm(folder)
    with pytest.raises(ValueError) as refused: load_data(str(folder))
    assert line in str(refused.value) and "\n" not in str(refused.value)
    assert main(flags(dataset=folder, output_dir=tmp_path / "out", **SHORT)) == 2
    assert line in capsys.readouterr().err and not (tmp_path / "out").exists()

def test_strays_are_passed_over(folder):
    before = [class_folders(folder / split) for split in ("train", "val")]
    for name in (".DS_Store", "class1/.DS_Store", "class2/._8.JPEG", "notes.txt", "class3/Thumbs.db", "class4/a.csv"):
        for split in ("train", "val"): (folder / split / name).write_text("stray")
    (folder / "train/.cache/images").mkdir(parents=True)
    (folder / "train/class0/.thumbnails").mkdir()
    os.mkfifo(folder / "train/class0/pipe.jpg")  # to open it would wait for ever
    assert [class_folders(folder / split) for split in ("train", "val")] == before
    assert training_samples(Experiment("resnet50", str(folder))) == 24

def test_links_to_images_and_to_class_folders_are_followed(folder, tmp_path):
    links = tmp_path / "links"
    for split in ("train", "val"):
        (links / split).mkdir(parents=True)
        for name in CLASSES[1:]: (links / split / name).symlink_to(folder / split / name)
        (links / split / "class0").mkdir()
        for path in (folder / split / "class0").iterdir(): (links / split / "class0" / path.name).symlink_to(path)
    streams = [Folder(path, workers=0, size=32) for path in (folder, links)]
    x, again = (torch.cat([x for x, _ in s.test_batches([(0, 12)])]) for s in streams)
    assert torch.equal(x, again)

# --- shared memory

@pytest.mark.parametrize("mib, processes, workers, expected", [
    (64, 1, 8, (8, 13)), (64, 4, 8, (8, 3)), (64, 1, 0, (0, 16)), (1024, 1, 8, (8, 16)), (1, 1, None, (1, 1))])
def test_what_is_read_ahead_fits_half_of_the_shared_memory(monkeypatch, mib, processes, workers, expected):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(mib << 20, 0, mib << 20))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    found, chunk = read_ahead(workers, 3 * 224 * 224)
    assert (found, chunk) == expected
    assert processes * max(1, found) * data.AHEAD * chunk * 3 * 224 * 224 <= mib << 19

def test_more_workers_than_the_shared_memory_holds(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(512), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert read_ahead(None, 3 * 224 * 224)[0] == 13
    with pytest.raises(ValueError, match="workers is 32 for each of 8 processes, but 64 MiB .* enough for 13: give"):
        read_ahead(32, 3 * 224 * 224)

STREAM = """
import sys
from adabatch.data import Folder
data = Folder(sys.argv[1], workers=8)
print(sum(len(y) for _, y in data.test_batches([(0, 600)] * 2)))
"""

def test_streaming_in_a_container_with_64_mib(tmp_path):
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("no shared memory of a chosen size can be mounted here")
    folder = write_images(tmp_path / "images", train=1, val=100, size=(8, 12))
    command = [*small, sys.executable, "-c", STREAM, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("1200\n", 0), done.stderr

# --- signals

SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from adabatch import train
from test_folder import network

def on_update(self, epoch, update, updates):
    if (epoch, update) == (1, 2) and not mark.exists():
        mark.touch()
        time.sleep(1)  # while workers read ahead

mark = Path(sys.argv[1])
train.get_model, train.Progress.on_update = network, on_update
sys.exit(train.main(sys.argv[2:]))
"""

@pytest.mark.parametrize("signum, processes", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_to_the_whole_process_group_while_images_stream(folder, tmp_path, signum, processes, tiny_network):
    (tmp_path / "script.py").write_text(SCRIPT)
    options = SHORT | dict(epochs=12, dataset=folder, workers=2, checkpoint_minutes=60, output_dir=tmp_path / "out")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [*(torchrun if processes > 1 else []), tmp_path / "script.py", tmp_path / "mark", *flags(**options)]
    child = program(*words)
    wait_for_file(tmp_path / "mark", child)
    os.killpg(child.pid, signum)  # torchrun passes it on to the group of each of its processes
    output = child.communicate(timeout=120)[0]
    assert f"stopped by {signum.name} after " in output, output
    assert child.returncode == (128 + signum if processes == 1 else 1)
    (checkpoint,) = (tmp_path / "out").rglob("*.pt")
    stopped = [load_checkpoint(checkpoint)[name] for name in ("epoch", "update")]
    assert stopped == [1, 2] if processes == 1 else [1, 2] <= stopped < [12, 0]  # several ask one another now and then
    again = program(*words)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    found = record.load(checkpoint.with_suffix(".npz"))
    alone = SHORT | dict(epochs=12, dataset=str(folder), workers=0, output_dir=str(tmp_path / "whole"))
    whole = run(Experiment(**alone))
    assert found.environment["restarts"] == 1
    if processes == 1: assert record.differences(found, whole) == []
    assert np.allclose(found.train_loss, whole.train_loss) and np.allclose(found.test_loss, whole.test_loss)

CHILD = """
import multiprocessing, sys
from adabatch.data import Folder

def read(folder):
    global data
    data = Folder(folder, workers=2, size=32)
    list(data.test_batches([(0, 12)]))

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=read, args=sys.argv[1:])
    child.start()
    child.join()
    print("ended", child.exitcode)
"""

def test_workers_end_with_a_process_of_multiprocessing(folder):
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("ended 0\n", 0), done.stderr

def test_a_run_that_was_killed_can_be_taken_up_at_once(folder, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    options = SHORT | dict(dataset=folder, workers=2, output_dir=tmp_path / "out")
    child = program(tmp_path / "script.py", tmp_path / "mark", *flags(**options))
    wait_for_file(tmp_path / "mark", child)
    (held,) = (tmp_path / "out").rglob("*.npz.lock")
    workers = children(child.pid)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # or they would end by themselves a little later, with any lock that they hold
    child.kill()
    child.wait()
    try: wait_until_free(held.with_suffix(""))
    finally:
        for pid in workers: os.kill(pid, signal.SIGKILL)
    assert len(workers) >= 2

def test_crops_are_those_of_torchvision_for_the_same_random_numbers(monkeypatch):
    "It asks for area, ratio and place in the same order, from PyTorch's global generator."
    rng = random.Random()
    def uniform(self, low, high): return self.fill_(rng.uniform(float(low), float(high)))
    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(torch, "randint", lambda low, high, size: torch.tensor(low + int(rng.random() * (high - low))))
    for seed in range(300):
        image = Image.new("L", [(500, 375), (60, 400), (300, 20), (1, 1)][seed % 4])
        rng.seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
        assert draw_crop(*image.size, random.Random(seed)) == (left, top, left + width, top + height)
