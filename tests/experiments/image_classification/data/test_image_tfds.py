"""Data sets of tensorflow_datasets, prepared and read without TensorFlow.

The builder below stands in for cifar10: same name and features, its images already encoded, since
only encoding an array needs TensorFlow.
"""

import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.image_classification.data import pipeline
from experiments.image_classification.data.preprocessing import RECIPES
from experiments.image_classification.data.tfds import TfdsSource

COUNTS = {"train": 24, "test": 10}
BUILDER = """
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def pixels(split, i):
    return np.random.default_rng([len(split), i]).integers(0, 256, (32, 32, 3), np.uint8)


class Cifar10(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("3.0.2")

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {s: self._generate_examples(s, n) for s, n in {"train": 24, "test": 10}.items()}

    def _generate_examples(self, split, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(pixels(split, i)).save(file, "PNG")
            yield str(i), {"id": str(i), "image": file.getvalue(), "label": i % 10}
"""
PREPARE = """
    import sys

    sys.path.insert(0, sys.argv[1])
    from stand_in.builder import Cifar10

    Cifar10(data_dir=sys.argv[2], file_format="array_record").download_and_prepare()
"""
TRAIN = """
    import sys

    from experiments.config import resolve
    from experiments.loop import train
    from pathlib import Path

    overrides = ["data.name=cifar10", f"data.dir={sys.argv[1]}", "batch_size=8"]
    overrides += ["data.recipe=cifar", "data.channels=3", "data.image_size=32"]
    train(resolve("configs/quickstart.py:dense,smoke", overrides), Path(sys.argv[2]))
    assert "tensorflow_datasets" in sys.modules
    print("tensorflow" in sys.modules)
"""


def python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def prepare(folder):
    package = folder / "stand_in"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "builder.py").write_text(BUILDER)
    python(PREPARE, folder, folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


def test_records_are_the_prepared_images(data_dir):
    for split, count in COUNTS.items():
        source = TfdsSource("cifar10", split, str(data_dir), 3)
        assert len(source) == count
        found = {source[i]["image"].tobytes(): int(source[i]["label"]) for i in range(count)}
        expected = {}
        for i in range(count):
            rng = np.random.default_rng([len(split), i])
            expected[rng.integers(0, 256, (32, 32, 3), np.uint8).tobytes()] = i % 10
        assert found == expected


@pytest.mark.slow
def test_training_reads_them_without_tensorflow(data_dir, tmp_path):
    assert python(TRAIN, data_dir, tmp_path / "run").splitlines()[-1] == "False"
    assert (tmp_path / "run" / "final.json").exists()


def test_unprepared_data_names_the_command(tmp_path):
    with pytest.raises(UserError) as error:
        TfdsSource("mnist", "train", str(tmp_path), 1)
    assert "\n" not in str(error.value)
    assert f"scripts/prepare_tfds mnist --data_dir={tmp_path}" in str(error.value)


def test_a_damaged_record_is_named(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "data")
    (file,) = copy.rglob("*train.array_record*")
    data = bytearray(file.read_bytes())
    data[20_000:20_500] = bytes(500)  # among the records: the file is padded at its end
    file.write_bytes(data)
    source = TfdsSource("cifar10", "train", str(copy), 3)
    with pytest.raises(UserError) as error:
        [source[i] for i in range(len(source))]
    assert "of cifar10/train" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_processes_read_them_too(data_dir):
    source = TfdsSource("cifar10", "train", str(data_dir), 3)
    streams = []
    for workers in (0, 1):
        options = pipeline.Options(
            recipe=RECIPES.get("cifar"),
            image_size=32,
            batch_size=8,
            seed=0,
            threads=1,
            workers=workers,
        )
        batches = pipeline.TrainBatches(source, options)
        streams.append([next(batches)["image"].copy() for _ in range(4)])
        batches.close()
    np.testing.assert_array_equal(*streams)
