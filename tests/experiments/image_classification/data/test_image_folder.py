"""Image folders: what they give, and one line for each thing that can be wrong with them."""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from experiments.errors import UserError
from experiments.image_classification.data import pipeline, sources
from experiments.image_classification.data.preprocessing import RECIPES


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 60, (20, 24, 3), np.uint8) + np.uint8(120 * label)
                Image.fromarray(pixels).save(folder / f"{i}.{'png' if i % 2 else 'JPEG'}")
    return tmp_path


def test_one_class_is_one_line(root):
    for split in ("train", "test"):
        shutil.rmtree(root / split / "dog")
    with pytest.raises(UserError) as error:
        sources.folder_classes(str(root))
    assert one_line(error) == f"{root}/train holds one class folder, 'cat'; must hold 2 at least"


def source(root, split="train", channels=3):
    classes = sources.folder_classes(str(root))
    return sources.FolderSource(sources.split_folder(str(root), split), classes, channels)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_images_and_labels_of_a_folder(root):
    data = source(root)
    examples = [data[i] for i in range(len(data))]
    assert [int(e["label"]) for e in examples] == [0] * 4 + [1] * 4
    assert all(e["image"].shape == (20, 24, 3) for e in examples)
    assert [e["image"].mean() > 100 for e in examples] == [False] * 4 + [True] * 4
    assert source(root, channels=1)[0]["image"].shape == (20, 24, 1)


def test_hidden_files_are_no_images(root):
    """An archive that was packed on a Mac holds `._0.jpg`, no image, for each 0.jpg."""
    for folder in (root / "train").iterdir():
        for name in ("._0.jpg", "._1.png"):
            (folder / name).write_bytes(b"\0\5\26\7 no image")
    data = source(root)
    assert [int(data[i]["label"]) for i in range(len(data))] == [0] * 4 + [1] * 4


def test_png_pixels_are_exact(root):
    pixels = np.asarray(Image.open(root / "train/cat/1.png"))
    data = source(root)
    assert any(np.array_equal(data[i]["image"], pixels) for i in range(len(data)))


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_to_eight(root, channels):
    ramp = np.linspace(0, 65_535, 256 * 20).astype(np.uint16).reshape(20, 256)
    Image.fromarray(ramp).save(root / "train" / "cat" / "0.0.png")
    image = source(root, channels=channels)[0]["image"]
    assert image.shape == (20, 256, channels)
    np.testing.assert_allclose(image[..., 0], ramp / 257.0, atol=0.51)


def test_an_alpha_channel_is_dropped(root):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 4), np.uint8)
    Image.fromarray(pixels).save(root / "train" / "cat" / "0.0.png")
    np.testing.assert_array_equal(source(root)[0]["image"], pixels[..., :3])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "BMP", "TIFF", "EPS"])
def test_another_kind_of_image_under_the_name_of_a_jpeg(root, kind):
    path = root / "train" / "cat" / "0.JPEG"
    Image.new("RGB", (8, 8)).save(path, kind)
    with pytest.raises(UserError) as error:
        source(root)[0]
    assert f"{path}: no JPEG or PNG image" in one_line(error)


def test_a_fifo_is_no_image(root):
    os.mkfifo(root / "train" / "dog" / "9.png")
    with pytest.raises(UserError, match="9.png: is no file"):
        source(root)


def test_val_is_read_where_there_is_no_test(root):
    (root / "test").rename(root / "val")
    assert len(source(root, "test")) == 8


def test_no_directory():
    with pytest.raises(UserError) as error:
        sources.folder_classes("")
    assert "config.data.dir is empty" in one_line(error)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError) as error:
        sources.folder_classes(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in one_line(error)
    assert "train" in one_line(error)


def test_missing_test_folder(root):
    (root / "test").rename(root / "elsewhere")
    with pytest.raises(UserError) as error:
        sources.folder_classes(str(root))
    assert "no folder test or val in" in one_line(error)


def test_folder_without_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    with pytest.raises(UserError) as error:
        sources.folder_classes(str(tmp_path))
    assert f"{tmp_path / 'train'} holds no class folders" in one_line(error)


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_folder_without_images(root, split):
    for path in (root / split / "dog").iterdir():
        path.unlink()
    (root / split / "dog" / "notes.txt").write_text("none")
    with pytest.raises(UserError) as error:
        source(root, split)
    assert str(root / split / "dog") in one_line(error)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_classes_that_differ(root, split, other):
    (root / split / "bird").mkdir()
    with pytest.raises(UserError) as error:
        sources.folder_classes(str(root))
    assert f"class 'bird' is in {root / split} but not in {root / other}" in one_line(error)


def damage(root, how):
    path = root / "train/dog" / ("1.png" if "png" in how else "2.JPEG")
    data = path.read_bytes()
    if "text" in how:
        path.write_text("this is no image")
    elif "empty" in how:
        path.write_bytes(b"")
    else:
        path.write_bytes(data[: len(data) // 2])
    return path


@pytest.mark.parametrize("how", ["half", "half png", "text", "empty", "text png"])
def test_a_damaged_image_is_named(root, how):
    path = damage(root, how)
    data = source(root)
    with pytest.raises(UserError) as error:
        [data[i] for i in range(len(data))]
    assert f"cannot decode image {path}: " in one_line(error)


def test_a_damaged_image_is_named_by_the_cache(root):
    path = damage(root, "half")
    with pytest.raises(UserError) as error:
        pipeline.cached(source(root), RECIPES.get("cifar"), 16)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_image_is_named_from_a_thread_or_a_process(root, workers):
    path = damage(root, "half")
    settings = pipeline.Options(
        recipe=RECIPES.get("imagenet"),
        image_size=16,
        batch_size=4,
        seed=0,
        threads=2,
        workers=workers,
    )
    batches = pipeline.TrainBatches(source(root), settings)
    with pytest.raises(UserError) as error:
        [next(batches) for _ in range(2)]
    batches.close()
    assert str(path) in one_line(error)
    with pytest.raises(UserError) as error:
        list(pipeline.eval_batches(source(root), settings))
    assert str(path) in one_line(error)


# Large enough batches come from the processes in shared memory.
READ_ALL = """
import sys
from experiments.errors import UserError
from experiments.image_classification.data import pipeline, sources
from experiments.image_classification.data.preprocessing import RECIPES
from experiments.training.prefetch import Prefetcher

if __name__ == "__main__":
    folder = sources.split_folder(sys.argv[1], "train")
    source = sources.FolderSource(folder, sources.folder_classes(sys.argv[1]), 3)
    options = pipeline.Options(
        recipe=RECIPES.get("imagenet"), image_size=224, batch_size=8, seed=0, threads=1, workers=2
    )
    with Prefetcher(pipeline.TrainBatches(source, options), lambda batch: batch) as batches:
        try:
            while True:
                batches.next()
        except UserError as error:
            print(error)
"""


@pytest.mark.slow
def test_a_damaged_image_among_processes_leaves_nothing_behind(root, tmp_path):
    """As a run that ends by it: with one line, and none about shared memory."""
    path = damage(root, "half")
    for i in range(60):
        shutil.copy(root / "train/dog/1.png", root / f"train/dog/1.{i}.png")
    (tmp_path / "read_all.py").write_text(READ_ALL)
    repository = str(pathlib.Path(__file__).parents[4])
    line = [sys.executable, str(tmp_path / "read_all.py"), str(root)]
    environment = os.environ | {"PYTHONPATH": repository}
    found = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert found.stderr == ""
    (told,) = found.stdout.splitlines()
    assert str(path) in told


FIRST_BATCH = (
    READ_ALL.partition("    with Prefetcher")[0]
    + """
    import multiprocessing, time
    batches = pipeline.TrainBatches(source, options)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(300)
"""
)


@pytest.mark.slow
def test_processes_end_with_the_one_that_is_killed(root, tmp_path):
    (tmp_path / "first_batch.py").write_text(FIRST_BATCH)
    repository = str(pathlib.Path(__file__).parents[4])
    line = [sys.executable, str(tmp_path / "first_batch.py"), str(root)]
    environment = os.environ | {"PYTHONPATH": repository}
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as process:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "processes of Grain are left"
        time.sleep(0.1)


@pytest.mark.slow
def test_processes_make_the_same_batches_as_threads(root):
    streams = []
    for workers in (0, 2):
        settings = pipeline.Options(
            recipe=RECIPES.get("imagenet"),
            image_size=16,
            batch_size=4,
            seed=0,
            threads=1,
            workers=workers,
        )
        batches = pipeline.TrainBatches(source(root), settings)
        streams.append([next(batches)["image"].copy() for _ in range(5)])
        batches.set_state({"batches": 2})
        streams[-1].append(next(batches)["image"].copy())
        batches.close()
    for threads, processes in zip(*streams, strict=True):
        np.testing.assert_array_equal(threads, processes)


def test_cached_images_equal_fresh_ones(root):
    kept = pipeline.cached(source(root), RECIPES.get("imagenet"), 16)
    data = source(root)
    for i in range(len(data)):
        np.testing.assert_array_equal(kept[i]["image"], data[i]["image"])
        assert kept[i]["label"] == data[i]["label"]
