"""A model and a text that a config names by import path: trained, evaluated, and generated from."""

import json
from pathlib import Path

import pytest

from experiments import export, main
from experiments.errors import UserError
from experiments.language_modelling import generate
from experiments.language_modelling.data.corpus import Text, from_text
from experiments.language_modelling.models import MODELS

CONFIG = """
from ml_collections import ConfigDict
from experiments.config import apply_variant, base_config

def get_config(variant=""):
    config = base_config("language_modelling")
    config.steps, config.batch_size, config.log_every = 60, 8, 20
    lengths = {"target": 16, "memory": 0}
    config.model = ConfigDict(
        {"name": "bigram:bigram", "width": 16, "train": lengths, "evaluation": dict(lengths)}
    )
    config.data.name = "test_own_model:rhyme"
    config.optimizer.name, config.optimizer.learning_rate = "adam", 0.05
    config.method.refresh_every = 10
    config.method.rules = (("kernel|head", "sparse"), ("embedding", "dense"))
    apply_variant(config, variant)
    return config
"""


def rhyme(data):
    return Text(open=lambda: from_text("rhyme", b"abcd" * 2_000, data.level, data.min_count))


def test_it_trains_and_writes_text(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    (tmp_path / "my_config.py").write_text(CONFIG)
    run = tmp_path / "run"
    assert main.main([f"--config={tmp_path / 'my_config.py'}:50/50", f"--workdir={run}"]) == 0
    final = json.loads((run / "final.json").read_text())
    assert final["test"]["bpc"] < 0.1
    assert final["test_context"]["tokens"] == 399
    file = tmp_path / "file.npz"
    assert export.main([f"--workdir={run}", f"--out={file}", "--form=dense"]) == 0
    capsys.readouterr()
    for flags in ([], [f"--params={file}"]):
        given = [f"--workdir={run}", "--prompt=ab", "--tokens=6", "--temperature=0", *flags]
        assert generate.main(given) == 0
        assert capsys.readouterr().out == "abcdabcd\n"


def test_a_name_is_registered_once():
    with pytest.raises(UserError, match=r"config.model.name: 'transformer_xl' is registered"):
        MODELS.register("transformer_xl", lambda model, size: None)
