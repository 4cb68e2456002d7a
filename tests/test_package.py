"""What a newcomer meets first: a quick import, a typed package, one version."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files

import pytest


def seconds_to_import(module: str) -> float:
    code = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    return min(times)


def test_import_takes_no_longer_than_that_of_torch():
    assert seconds_to_import("lathe") < 0.2 * seconds_to_import("torch")
    assert seconds_to_import("torch, lathe; lathe.swap; lathe.measure") < 1.5 * seconds_to_import("torch") + 0.2


def test_the_package_is_typed_and_has_one_version():
    import lathe

    assert files("lathe").joinpath("py.typed").is_file()
    assert lathe.__version__ == version("torchlathe")


def test_a_name_that_is_not_there_is_an_attribute_error():
    import lathe

    assert {"swap", "measure", "fit"} <= set(dir(lathe))
    with pytest.raises(AttributeError, match="no attribute 'swop'"):
        _ = lathe.swop
