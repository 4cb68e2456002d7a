"""What `lathe predict` does before and after the prediction: finds the network, and its example."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["CommandError", "found", "made", "shape_of"]


class CommandError(ValueError):
    """What is wrong with what was asked for, in one line."""


def found(network: str) -> Callable[..., Any]:
    """The function (or class) that `package.module:function` names; the current directory can be imported.

    Raises:
        CommandError: where there is no such module or function, or the module breaks.
    """
    module_name, _, attribute = network.partition(":")
    if not module_name or not attribute:
        raise CommandError(f"NETWORK must be package.module:function, got {network!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        inside = f" (which {module_name} imports)" if not f"{module_name}.".startswith(f"{error.name}.") else ""
        raise CommandError(f"there is no module {error.name!r}{inside}; run this where it can be imported") from None
    except Exception as error:
        raise CommandError(f"importing {module_name!r} failed: {type(error).__name__}: {error}") from None
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise CommandError(f"{module_name!r} has no {attribute!r}")
        value = getattr(value, part)
    if not callable(value) or isinstance(value, nn.Module):
        raise CommandError(f"{network!r} must be a function that returns a network, got {type(value).__name__}")
    return value


def made(function: Callable[..., Any], name: str, *arguments: Any) -> tuple[nn.Module, Any]:
    """What the function gives: a network, and an example input or None.

    Raises:
        CommandError: where it breaks, or gives something else.
    """
    try:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(sys.stderr):
            result = function(*arguments)
    except Exception as error:
        raise CommandError(f"{name!r} failed: {type(error).__name__}: {error}") from None
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise CommandError(
            f"{name!r} must return a torch.nn.Module, or one and its example input, got {type(result).__name__}"
        )
    return model, example


def shape_of(text: str) -> tuple[int, ...]:
    """`8x3x32x32` as a shape.

    Raises:
        CommandError: for anything else.
    """
    sizes = text.replace(",", "x").split("x")
    if not all(size.strip().isdigit() and int(size) > 0 for size in sizes):
        raise CommandError(f"--input must be a shape such as 8x3x32x32, got {text!r}")
    return tuple(int(size) for size in sizes)
