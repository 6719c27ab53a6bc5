"""docs/tour.ipynb runs, and what it says about the method holds in its own numbers."""

import json
import pathlib
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from processes import one_device

NOTEBOOK = pathlib.Path(__file__).parent.parent / "docs" / "tour.ipynb"
CELLS = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]


PROGRAM = """
import json, pickle, sys
import jax, matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
plt.show = lambda: None
names = {}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), "tour.ipynb", "exec"), names)
wanted = "fixed kept full shares seen compact_accuracy compact held dense_held".split()
found = jax.device_get({name: names[name] for name in wanted})
pickle.dump(found, open(sys.argv[2], "wb"))
"""


@pytest.fixture(scope="module")
def scope(tmp_path_factory):
    """Names that the cells leave, run in order by a process with one device in three minutes."""
    path = tmp_path_factory.mktemp("tour") / "names"
    environment = one_device(optimization=1) | {"JAX_NUMPY_RANK_PROMOTION": "allow"}
    command = [sys.executable, "-c", PROGRAM, str(NOTEBOOK), str(path)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=180)
    return pickle.loads(path.read_bytes())


def test_it_is_shown_with_its_results():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_top_kast_is_ahead_of_a_random_mask_and_behind_dense(scope):
    assert scope["fixed"] + 0.02 < scope["kept"] < scope["full"] + 0.01
    assert scope["kept"] > 0.8


def test_the_sets_settle_where_the_digits_are(scope):
    shares, seen = scope["shares"], scope["seen"]
    assert np.mean(shares[-3:]) < np.mean(shares[:3]) / 2
    used = {step: np.asarray(seen[step][0]["first"]["kernel"]).sum(1) for step in (0, 300)}
    border = np.ones((28, 28), bool)
    border[4:-4, 4:-4] = False
    start, end = (used[step][border.ravel()].sum() for step in (0, 300))
    assert end < start / 2


def test_always_sparse_learns_the_same_in_less_memory(scope):
    assert abs(scope["compact_accuracy"] - scope["kept"]) < 0.03
    assert scope["held"] < 0.2 * scope["dense_held"]
    assert all(leaf.size < 0.2 * 784 * 300 for leaf in jax.tree.leaves(scope["compact"]))
