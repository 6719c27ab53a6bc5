"""scripts/aot_tpu.py, scripts/bench_memory.py and scripts/setup: what they print and refuse."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from toy_runs import CONFIG

from experiments.config import resolve
from experiments.errors import UserError
from experiments.tpu import compiling, library
from experiments.training import partition
from experiments.training.program import build
from scripts import aot_products, aot_tpu, bench_memory
from topkast_jax.always_sparse.products import native_library

ROOT = pathlib.Path(__file__).parents[3]
needs_compiler = pytest.mark.skipif(library.find() is None, reason="no libtpu: scripts/setup aot")


def call(capsys, main, *args):
    status = main(args)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def record():
    return aot_tpu.report(f"{CONFIG}:80/60", ["mesh.fsdp=2"], "v5e:2x2", None)


@needs_compiler
def test_reports_a_step(record):
    assert json.loads(json.dumps(record)) == record
    assert (record["config"], record["devices"], record["fits"]) == ("toy_config:80/60", 4, True)
    assert record["flops"] > 0
    assert record["collectives"]["all-reduce"]["count"] > 0
    assert record["roofline_seconds"] == max(record["seconds"].values()) > 0
    assert record["costliest"]["bytes_moved"] > record["bytes_moved"]
    assert record["unknown"] == {"loops": 0, "kernels": 0}


@needs_compiler
def test_arguments_hold_the_state(record):
    run = build(resolve(f"{CONFIG}:80/60", ["mesh.fsdp=2"]), compiling.target("v5e:2x2").devices)
    here = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(run.representation.abstract())
    )
    assert record["device_bytes"]["arguments"] >= here


@needs_compiler
def test_an_always_sparse_run_keeps_its_reservoir_on_the_host(record):
    setting = ["method.always_sparse=True", "mesh.fsdp=2"]
    compact = aot_tpu.report(f"{CONFIG}:80/60", setting, "v5e:2x2", None)
    assert compact["reservoir_bytes"] > record["reservoir_bytes"] == 0
    assert "costliest" not in compact
    arguments = [r["device_bytes"]["arguments"] for r in (compact, record)]
    assert arguments[0] < arguments[1]


REFUSED = {
    "--topology=v9:2x2": "v9:2x2",
    "--topology=v5e:3x5": "v5e:3x5",
    "--topology=v5e:2x2 --devices=9": "--devices=9",
    "--topology=v5e:2x2 --devices=3": "form no mesh; must be one of 1, 2, 4",
    "--topology=v4:2x2x1 --devices=5": "--devices=5: v4:2x2x1 has 4",
    "--topology=v5e:2x2 --devices=0": "--devices",
    "--topology=v5e:2x2 --config.batch_size=3": "config.batch_size",
    "--topology=v5e:2x2 --config.stepss=3": "'steps'",
    "--topology=v5e:2x2 --workdir=here": "--workdir",
    "--devices=1": "--topology",
}


@needs_compiler
@pytest.mark.parametrize("flags", REFUSED)
def test_mistakes_are_one_line(capsys, flags):
    status, out, err = call(capsys, aot_tpu.main, f"--config={CONFIG}", *flags.split())
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert REFUSED[flags] in err


@needs_compiler
def test_runs_beside_another_process_and_prints_one_line():
    compiling.target("v5e:2x2")  # the compiler is in use here
    flags = [f"--config={CONFIG}", "--topology=v5e:2x2", "--devices=9"]
    ours = ("TPU_", "ALLOW_MULTIPLE", "JAX_PLATFORMS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    run = subprocess.run(
        [sys.executable, ROOT / "scripts/aot_tpu.py", *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: --devices=9: v5e:2x2 has 4\n"


@pytest.mark.parametrize("script", [aot_tpu, bench_memory, aot_products])
def test_no_compiler_is_one_line(capsys, monkeypatch, script):
    monkeypatch.setattr(library, "find", lambda: None)
    monkeypatch.setenv("TPU_LIBRARY_PATH", "removed by the script, and restored after the test")
    flags = (f"--config={CONFIG}", "--topology=v5e:2x2") if script is aot_tpu else ()
    status, out, err = call(capsys, script.main, *flags)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "scripts/setup aot" in err


@needs_compiler
def test_a_mesh_that_does_not_fit_a_topology_is_one_line():
    devices = compiling.target("v5p:4x4x4").devices
    with pytest.raises(UserError, match="^config.mesh: found .*'fsdp': 32") as error:
        partition.make_mesh({"data": 2, "fsdp": 32, "tensor": 1}, devices)
    assert "\n" not in str(error.value)


@needs_compiler
def test_the_backend_is_that_of_the_devices_compiled_for():
    spec = f"{ROOT / 'configs/enwik8_small.py'}:50/40"
    blocks = ["method.always_sparse=True", "method.pattern=block:128x128"]
    one = compiling.target("v5e:2x2", 1).devices
    build(resolve(spec, [*blocks, "method.backend=pallas_tpu"]), one)
    with pytest.raises(UserError, match="must be None or 'xla' or 'pallas_tpu' on devices of tpu"):
        build(resolve(spec, [*blocks, "method.backend=pallas_gpu"]), one)


@needs_compiler
@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--patterns=block:128x128,block:7x7", "Block(7, 7) does not divide"),
        ("--patterns=block:1024x1024", "less than one block"),
        ("--masked", "never seen"),
    ],
)
def test_every_pattern_is_checked_before_the_first_is_compiled(monkeypatch, capsys, flag, told):
    def stop(*_):
        raise UserError("never seen")

    monkeypatch.setattr(bench_memory, "measure", stop)
    status, out, err = call(capsys, bench_memory.main, flag)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert told in err


@needs_compiler
def test_state_is_counted_per_entry():
    one = compiling.target("v5e:2x2", 1).devices
    run = build(resolve(f"{CONFIG}:dense", ["optimizer.name=adam"]), one)
    entries = sum(leaf.size for leaf in jax.tree.leaves(run.representation.abstract().params))
    counters = bench_memory.state_bytes(run) - 4 * 4 * entries
    assert 0 < counters <= 16


@needs_compiler
def test_the_state_of_a_compact_run_is_its_backward_set():
    """Values, gradients, two moments and places; the toy has kernels of 512 and 128 entries."""
    one = compiling.target("v5e:2x2", 1).devices
    setting = ["optimizer.name=adam", "method.always_sparse=True"]
    run = build(resolve(f"{CONFIG}:80/60", setting), one)
    backward, dense, counters = 205 + 51, 32 + 4, 3
    assert bench_memory.state_bytes(run) == 4 * (5 * backward + 4 * dense + counters)


@pytest.mark.slow
@needs_compiler
def test_always_sparse_training_takes_little_memory(capsys):
    """What the issue asks of the large model, of one that compiles sooner."""
    sizes = {"n_layer": 8, "d_model": 512, "d_inner": 512, "d_head": 64}
    flags = [f"--config.model.{name}={size}" for name, size in sizes.items()]
    status, out, _ = call(capsys, bench_memory.main, "--skip_largest", *flags)
    found = json.loads(out.splitlines()[-1])["patterns"]
    assert (status, list(found)) == (0, ["block:128x128", "unstructured"])
    for ratios in found.values():
        assert ratios["state_ratio"] <= 0.30
        assert ratios["device_ratio"] <= 0.40


@pytest.mark.slow
@needs_compiler
def test_block_kernels_on_several_devices_take_a_part_of_the_tokens_each():
    """Over both axes of the mesh: 8 lanes of 64 tokens are 128 for each of 4 devices."""
    setting = ["method.always_sparse=True", "method.pattern=block:128x128", "mesh.fsdp=2"]
    setting += ["batch_size=8", "model.n_layer=1"]
    run = build(
        resolve(f"{ROOT / 'configs/enwik8_small.py'}:50/40", setting),
        compiling.target("v5e:2x2").devices,
    )
    text = compiling.compile(compiling.lower(run)).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') > 10
    # The feed-forward block's, 256 -> 768: forward, once more where it is rematerialised, backward.
    made = re.findall(r"%block_spmm\S* = \w+\[(\d+),768\]", text)
    assert len(made) >= 2
    assert set(made) == {"128"}


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("limit", [24, 25, 81, 260, 1000])
def test_the_deepest_model_is_found(limit, says):
    seen = []

    def at(layers):
        seen.append(layers)
        total = 100 + 10 * layers
        fits = layers <= limit
        return bench_memory.Measured(layers, layers, 0, total if fits or says else 0, fits)

    found = bench_memory.deepest(at(24), 100 + 10 * limit + 9, at, tolerance=0.01)
    assert limit - max(1, 0.01 * limit) <= found.layers <= limit
    assert len(seen) <= 12


def test_setup_does_nothing_twice(tmp_path):
    """An environment with fitting stamps is left alone: its Python is never called."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text("#!/bin/sh\nexit 7\n")
    python.chmod(0o755)
    stamps = {".made-from": "requirements.lock", "aot/.made-from": "requirements-aot.lock"}
    for stamp, lock in stamps.items():
        (tmp_path / stamp).parent.mkdir(exist_ok=True)
        with (ROOT / lock).open("rb") as file:
            made = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True, check=True)
        end = " " if lock == "requirements.lock" else ""
        (tmp_path / stamp).write_text(made.stdout.rstrip("\n") + end + "\n")
    sources = (
        *native_library.SOURCES,
        pathlib.Path(native_library.__file__),
        tmp_path / ".made-from",
    )
    text = b"".join(source.read_bytes() for source in sources)
    machine = "grep -m 1 ^flags /proc/cpuinfo || uname -m; echo ${XDG_CACHE_HOME:-} ${HOME:-}"
    text += subprocess.run(["bash", "-c", machine], capture_output=True, check=True).stdout
    made = subprocess.run(["cksum"], input=text, capture_output=True, check=True)
    (tmp_path / ".products-from").write_bytes(made.stdout + str(python).encode() + b"\n")
    environment = {**os.environ, "TOPKAST_VENV": str(tmp_path), "TOPKAST_EXTRAS": ""}
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for arguments in ([], ["aot"]):
        subprocess.run([ROOT / "scripts/setup", *arguments], env=environment, check=True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_the_compiler_is_pinned_alone():
    lines = (ROOT / "requirements-aot.lock").read_text().splitlines()
    names = {line.split("==")[0] for line in lines if not line.startswith(("#", " "))}
    assert names == {"libtpu"}
    assert not any("://" in line for line in lines)
    assert sum("--hash=sha256:" in line for line in lines) >= 2


@needs_compiler
def test_products_of_one_kernel(capsys):
    """Counted by hand: 20 of 200 blocks in A, 40 in B; the dense products read and write all."""
    flags = "--topologies=v5e:2x2 --dtypes=bfloat16 --kernels=1280x2560 --densities=90/80"
    status, out, err = call(capsys, aot_products.main, *flags.split(), "--tokens=512")
    assert (status, err) == (0, "")
    rows = json.loads(out.splitlines()[-1])["results"]
    assert [row["unknown_kernels"] for row in rows] == [0] * 6
    flops = {(row["product"], row["density"]): row["flops"] for row in rows}
    dense, block = 2 * 512 * 1280 * 2560, 2 * 512 * 128 * 128
    for product, blocks in (("y", 20), ("dx", 20), ("dw", 40)):
        assert flops[product, "dense"] == dense
        assert flops[product, "90/80"] == blocks * block
    for row in rows:
        if row["density"] == "dense":
            moved = 2 * (512 * 1280 + 1280 * 2560 + 512 * 2560)
            # What the compiler keeps on the chip does not move.
            assert 0.3 * moved < row["bytes_moved"] <= moved
        seconds = row["flops"] / 197e12, row["bytes_moved"] / 819e9
        np.testing.assert_allclose(row["roofline_seconds"], max(seconds), rtol=1e-3)
        assert row["bound"] == ("compute", "memory")[int(np.argmax(seconds))]
    assert "| v5e bfloat16 90/80 |" in out


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--kernels=1024", "1024x3072"),
        ("--kernels=1024x1000", "1000"),
        ("--topologies=v9:2x2", "v9"),
        ("--densities=91/80", "90/80"),
    ],
)
def test_mistakes_about_products_are_one_line(capsys, flags, told):
    status, _, err = call(capsys, aot_products.main, flags)
    assert (status, len(err.splitlines())) == (2, 1)
    assert told in err
