"""Small fixtures; torch on one thread, so that results do not depend on the machine's load.

Fixtures import for themselves: the process that hands out the tests loads this file too, and needs none of it.
"""

import gc
import os
import sys
from pathlib import Path

import pytest
from forks import python, start_kernel

TINY = Path(__file__).parent / "data" / "tiny-ursa"
gc.disable()  # until all is imported: see pytest_collection_finish
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch, which is imported later, here and in processes that tests start
# without it jsonschema does not check addresses (IRIs), which no notebook has: its import takes three seconds
sys.modules["rfc3987_syntax"] = None

LONG = (
    "launch", "notebooks", "plan", "browser", "release", "resume", "watch", "savings", "evaluation_jobs", "trainer",
    "check_alignment", "graph", "reference_free", "sampling", "apart", "signals", "grid", "lower", "keys", "engine",
    "guards", "cli", "trajectories", "sequence", "docs", "kept", "judging", "prompts", "processes", "sprites", "output",
    "alignment", "full_disk", "environment", "suites", "views", "ursa_folder", "tables", "trust", "terminal",
    "together",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Files that take long come first: side by side, none of them is left alone at the end."""
    first = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.stem, len(LONG)))


def pytest_collection_finish():
    """What has been imported stays: a collection need not go through its millions of objects again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def graphs_made():
    """(graphs, compiling): `compiling(function)` compiles it as on a GPU, and `graphs` has what was made of all."""
    import torch

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return graphs, lambda function: torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


@pytest.fixture(scope="session")
def world():
    from dimo.worlds import checkpoint_folder, load_world

    return load_world(checkpoint_folder("shapes"))


@pytest.fixture(scope="session")
def ursa():
    from dimo.ursa import load_ursa
    from dimo.worlds import checkpoint_folder

    loaded = load_ursa(checkpoint_folder("shapes"))
    loaded.transformer.requires_grad_(False)
    return loaded


@pytest.fixture(scope="module")
def tiny():
    """A URSA checkpoint of the smallest sizes."""
    from dimo.ursa import load_ursa

    loaded = load_ursa(TINY)
    loaded.transformer.requires_grad_(False)
    return loaded


@pytest.fixture(scope="session", autouse=True)
def forked():
    """The processes of forks.py: one server for all modules."""
    yield
    python.end()


@pytest.fixture(scope="module")
def forked_kernels():
    """Kernels that this process starts import nothing; those of a command are as always."""
    python.begin()  # before `dimo run`, which waits for the children that come while a notebook runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", start_kernel)
        yield


@pytest.fixture
def generator():
    import torch

    return torch.Generator().manual_seed(0)
