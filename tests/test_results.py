"""The tables under results/ are those of the records beside them."""

import json
from pathlib import Path

import pytest

from experiments.reporting import tables
from experiments.reporting.groups import collect, once

ROOT = Path(__file__).parent.parent / "results"


@pytest.mark.parametrize("name", ["images", "texts", "digits"])
def test_tables_are_made_again_from_the_records(name, tmp_path):
    found, _ = collect([ROOT / name])
    groups, _ = once(found)
    listed = tables.of_report([ROOT / name], found, groups)
    assert len(listed) > 1
    for table in listed:
        table.write_csv(tmp_path / "table.csv")
        committed = ROOT / name / "report" / table.name
        assert committed.with_suffix(".md").read_text() == table.markdown()
        assert committed.with_suffix(".csv").read_bytes() == (tmp_path / "table.csv").read_bytes()


@pytest.mark.parametrize("sparsity", [95, 98])
def test_top_kast_is_ahead_of_a_random_mask_with_each_seed_of_the_quickstart(sparsity):
    def accuracies(method):
        runs = (ROOT / "digits" / f"{method}_{sparsity}").glob("seed-*/final.json")
        return [json.loads(run.read_text())["test"]["accuracy"] for run in runs]

    ahead, behind = accuracies("top_kast"), accuracies("static")
    assert len(ahead) == len(behind) == 3
    assert min(ahead) > max(behind)
