"""setuptools' build backend, which also asks for PyTorch where there is CUDA code to compile and no PyTorch yet."""

from __future__ import annotations

import os

from native_build import BuildError, decide, torch_root
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

__all__ = ["get_requires_for_build_editable", "get_requires_for_build_wheel"]


def _torch() -> list[str]:
    """PyTorch's headers, if nothing but them is missing; pip gives them to the build alone."""
    if torch_root() is not None or os.environ.get("CEIT_KERNELS_CUDA") == "0":
        return []
    try:
        return ["torch>=2.10"] if decide(assume_torch=True).kind == "cuda" else []
    except BuildError:
        return []


def get_requires_for_build_wheel(config_settings=None):
    """What pip installs for building a wheel."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings=None):
    """What pip installs for an editable installation."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()
