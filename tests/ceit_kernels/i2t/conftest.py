import pytest
import torch
from support.where import ON_GPU

from ceit_kernels import use_backend
from ceit_kernels.operators import OPERATORS


@pytest.fixture(scope="session")
def stem_kernels():
    """The kernels: on a GPU the extension's, else the same code on the host."""
    if ON_GPU:
        return None
    from support.host_kernels import load_stem_kernels

    return load_stem_kernels()


@pytest.fixture(autouse=True)
def host_code(monkeypatch):
    """Let the GPU's code, where it runs on the host, serve CPU tensors in the place of the code for the CPU."""
    native = OPERATORS["i2t"].implementations["native"]
    code = native["cuda"]
    monkeypatch.setitem(native, "cpu", code._replace(dtypes=(*code.dtypes, torch.float64)))


@pytest.fixture
def native(stem_kernels):
    with use_backend("i2t=native"):
        yield stem_kernels
