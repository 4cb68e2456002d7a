"""Checkpoints of `fit`: written whole or not at all, and checked before a byte of them is used.

A folder holds one checkpoint: `checkpoint.json` names its files with their sha256 and is replaced last, in one step, so
that a run killed at any moment leaves the one before. Weights are safetensors; the rest (optimiser, schedule, random
numbers, history) is read with `torch.load(weights_only=True)`: nothing in a checkpoint is run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["CheckpointError", "Checkpoints", "load_weights"]

_MANIFEST = "checkpoint.json"
_FORMAT = 1
_OURS = re.compile(
    r"\.(model|best|training)-\d{9}\.(safetensors|pt)"  # being written
    r"|(model|best|training)-\d{9}-[0-9a-f]{8}\.(safetensors|pt)"
    r"|\.checkpoint\.json"
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file and what to do."""


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def prepare(self) -> None:
        """Make the folder and prove that it can be written to, before any training is done."""
        probe = self.folder / f".writable-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(f"checkpoint folder {self.folder} cannot be written to: {_reason(error)}") from error

    def exists(self) -> bool:
        return (self.folder / _MANIFEST).exists()

    def save(self, step: int, states: dict[str, dict[str, Any]], rest: dict[str, Any]) -> None:
        """Write weights (`states`: name -> state_dict) and `rest`, then forget the checkpoint before.

        Raises:
            CheckpointError: where the folder cannot be written to or is full; the checkpoint before stays as it was.
        """
        rest = {**rest, "states": {}}
        written: dict[str, str] = {}
        try:
            for name, state in states.items():
                tensors, metadata, others = _pack(state)
                rest["states"][name] = {"others": others}
                written |= self._write(name, step, ".safetensors", partial(_save_tensors, tensors, metadata))
            written |= self._write("training", step, ".pt", lambda path: path.write_bytes(_serialise(rest)))
            manifest = {"format": _FORMAT, "step": step, "files": written}
            draft = self.folder / f".{_MANIFEST}"
            draft.write_text(json.dumps(manifest, indent=1) + "\n")
            _flush(draft)
            os.replace(draft, self.folder / _MANIFEST)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            before = f"the checkpoint before it is untouched in {self.folder}" if self.exists() else "there is none yet"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {_reason(error)}; {before}"
            ) from error
        finally:
            self._sweep()

    def load(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """The weights and the rest, both checked against their sha256.

        Raises:
            CheckpointError: where a file is missing, unreadable or not what was written, by its name.
        """
        files = self._files()
        for name, digest in files.items():
            path = self.folder / name
            try:
                with path.open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise _broken(path, _reason(error)) from error
            if found != digest:
                raise _broken(path, "its bytes are not those that were written (sha256 differs)")
        path = next(self.folder / name for name in files if name.endswith(".pt"))
        try:
            rest = torch.load(path, map_location="cpu", weights_only=True)
            states = {}
            for name in files:
                if name.endswith(".safetensors"):
                    path = self.folder / name
                    key = name.split("-")[0]
                    states[key] = _unpack(path, rest["states"][key]["others"])
        except (
            OSError,
            RuntimeError,
            EOFError,
            KeyError,
            ValueError,
            SafetensorError,
            pickle.UnpicklingError,
        ) as error:
            raise _broken(path, _reason(error)) from error
        return states, rest

    def _files(self) -> dict[str, str]:
        path = self.folder / _MANIFEST
        try:
            manifest = json.loads(path.read_text())
            files = manifest["files"]
            if manifest["format"] != _FORMAT:
                raise ValueError(f"its format is {manifest['format']}, this version reads {_FORMAT}")
            for name, digest in files.items():
                if Path(name).name != name or not isinstance(digest, str):
                    raise ValueError(f"it names the file {name!r}")
            if not any(name.endswith(".pt") for name in files):
                raise ValueError("it names no training state")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(path, _reason(error)) from error
        return files

    def _write(self, name: str, step: int, suffix: str, write: Callable[[Path], Any]) -> dict[str, str]:
        draft = self.folder / f".{name}-{step:09d}{suffix}"
        write(draft)
        _flush(draft)
        with draft.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        # The digest in the name keeps a new run from writing over a file that the old manifest still needs.
        final = f"{name}-{step:09d}-{digest[:8]}{suffix}"
        os.replace(draft, self.folder / final)
        return {final: digest}

    def _sweep(self) -> None:
        """Remove what the manifest does not name: the checkpoint before, or the pieces of one that failed."""
        try:
            keep = set(self._files()) if self.exists() else set()
        except CheckpointError:
            return
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in keep:
                with suppress(OSError):
                    path.unlink()


def load_weights(model: nn.Module, state: dict[str, Any], folder: Path) -> None:
    """Load a state_dict, with an error that names the folder where it does not fit the network."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        detail = lines[1] if len(lines) > 1 else lines[0]
        raise CheckpointError(
            f"the checkpoint in {folder} is of another network: {detail} (another folder or resume=False starts anew)"
        ) from error


def _pack(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Tensors to store, metadata, and what is no tensor. Tied tensors are stored once, complex ones as pairs."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    complexes: list[str] = []
    others: dict[str, Any] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            others[name] = value
            continue
        value = value.detach()
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and names.setdefault(key, name) != name:
            tied[name] = names[key]
            continue
        if value.is_complex():
            complexes.append(name)
            value = torch.view_as_real(value.resolve_conj())
        # A copy, for safetensors refuses views that share a storage.
        tensors[name] = value.to("cpu", copy=True).contiguous()
    return tensors, {"tied": json.dumps(tied), "complex": json.dumps(complexes)}, others


def _unpack(path: Path, others: dict[str, Any]) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    for name in json.loads(metadata.get("complex", "[]")):
        state[name] = torch.view_as_complex(state[name])
    for name, stored in json.loads(metadata.get("tied", "{}")).items():
        state[name] = state[stored]
    return state | others


def _save_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    save_file(tensors, path, metadata)


def _serialise(rest: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    content = buffer.getvalue()
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the state of the optimiser, schedule or network holds objects that cannot be read back without running "
            f"code from the checkpoint: {_reason(error)}"
        ) from error
    return content


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows flushes no folders
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not folder:
            raise
    finally:
        os.close(handle)


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint file {path} cannot be used: {why}; delete {path.parent} or pass resume=False")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = str(error).strip().splitlines()
    return first[0] if first else type(error).__name__
