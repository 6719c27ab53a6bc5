"""Runs of one test process share what they compile."""

import pytest
import toy_runs


@pytest.fixture(scope="session", autouse=True)
def _shared_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.loop.build", toy_runs.shared_program)
        yield
