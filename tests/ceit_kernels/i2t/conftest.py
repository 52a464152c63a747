import pytest
from support.where import ON_GPU

from ceit_kernels import use_backend


@pytest.fixture(scope="session")
def stem_kernels():
    """The kernels: on a GPU the extension's, else the same code on the host."""
    if ON_GPU:
        return None
    from support.host_kernels import load_stem_kernels

    return load_stem_kernels()


@pytest.fixture
def native(stem_kernels):
    with use_backend("i2t=native"):
        yield stem_kernels
