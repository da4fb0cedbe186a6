"""What every test starts from."""

import collections
import gc
import multiprocessing
import os
import pathlib
import sys
from multiprocessing import forkserver

import pytest
import torch
from hypothesis import HealthCheck, settings

# Every run draws the same examples; see drawing.py.
settings.register_profile("suite", derandomize=True, deadline=None, print_blob=True)
settings.register_profile(
    "long",
    derandomize=False,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")

# Of two workers on two cores each has one.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# Files that take long for the number of their tests. They are begun first: a worker that is given
# one of them at the end works on while the other has nothing left.
LONG = [
    "test_any_order.py",
    "test_distributed.py",
    "test_sharded.py",
    "test_commonsense.py",
    "test_visual_instruction.py",
    "test_recipe.py",
    "test_benchmarks.py",
    "test_interruptions.py",
    "test_export.py",
    "test_compile.py",
]


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist's own, by the number of tests alone
    config.option.maxworkerrestart = "0"  # a new worker would begin with the test that ended this


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path]))


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What was imported, or is left of other files, is not searched whenever a test looks for
    garbage, as each of the Trainer's trainings does: a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def processes():
    """Forked from one that has imported everything, which takes longer than what they do."""
    path = os.environ.get("PYTHONPATH")
    here = str(pathlib.Path(__file__).parent)  # and the folders in it that pyproject.toml names
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p.startswith(here))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_runs", "trainer_runs"])
    forkserver.ensure_running()
    if path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = path
    return context


@pytest.fixture
def one_thread():
    """On layers this small, a second thread only waits: without this, four times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_accelerate():
    """Accelerate's state is as before the first use, for this test and after it."""
    pytest.importorskip("accelerate", reason="the transformers extra is not installed")
    from accelerate_state import reset

    reset()
    yield
    reset()
