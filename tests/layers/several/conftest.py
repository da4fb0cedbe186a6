"""The adapters on disk, and all of them on one model."""

import pytest
from three_adapters import KINDS, alone, fresh

import tokengate


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each of them, saved."""
    found = {}
    for name in KINDS:
        found[name] = tmp_path_factory.mktemp(name)
        tokengate.save(alone(name), found[name])
    return found


@pytest.fixture
def model(folders):
    """All of them on one model, "a" in use."""
    model = fresh().eval()
    for name, folder in folders.items():
        tokengate.load(model, folder, name=name)
    return model
