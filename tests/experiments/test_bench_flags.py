"""A mistake on a bench script's command line is one line that says what is wrong, and status 2."""

import pytest

from scripts import bench_always_sparse, bench_refresh, bench_selection, bench_step


@pytest.mark.parametrize(
    ("script", "flag", "found", "allowed"),
    [
        (bench_always_sparse, "--patterns=block128,block7", "block7", "block64, block32"),
        (bench_always_sparse, "--densities=90", "--densities", "90/80, 95/90"),
        (bench_always_sparse, "--repeats=0", "--repeats", "at least 1"),
        (bench_refresh, "--variant=nope", "'nope'", "small-dense-F"),
        (bench_refresh, "--config.method.patern=block:16x16", "method.patern", "pattern"),
        (bench_selection, "--entries=4194304,abc", "abc", "multiples of 2048"),
        (bench_selection, "--entries=100", "'100'", "multiples of 2048"),
        (bench_step, "--cases=mlp", "'mlp'", "mlp_b128_r100"),
        (bench_step, "--pairs=many", "'many'", "at least 1"),
        (bench_step, "--pair=1", "--pair=1", "--help"),
    ],
)
def test_wrong_flag(script, flag, found, allowed, capsys):
    assert script.main([flag]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert found in err
    assert allowed in err
