"""Shapes in signatures are checked while the tests run; every test starts from the same seeds, on one thread."""

from __future__ import annotations

import os

import pytest

if os.environ.get("LATHE_SHAPE_CHECKS", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("lathe", "shape_checks.checked")


@pytest.fixture(autouse=True)
def _same_start():
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def rng():
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def shape_checks_off():
    """The library's own errors, which the checks of signatures would come before."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
