"""A model's tensors in a folder of ``torch.distributed.checkpoint``: ``.metadata`` and files ``__<rank>_<number>.distcp``.

One process reads what several have written, without a process group: each tensor is put together from the pieces that the processes
held. What lies beside the model, such as the state of its optimizer, is not read. The metadata are a pickle, which is only let
make what they consist of.
"""

import dataclasses
import math
import pathlib
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from kdlib.errors import KdlibError

METADATA = ".metadata"
# What wraps a model in training, and is part of its tensors' names then.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def is_dcp(folder: Path) -> bool:
    """Whether a folder holds such files."""
    return (folder / METADATA).is_file() or any(folder.glob("__*_*.distcp"))


def state_dict(folder: Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of a model in such a folder, by the model's own names, in the dtypes they were saved in.

    They may lie at the top or below any names (``model``, ``app.model``), with or without the names of wrappers in between.

    Args:
        expected: shape of each tensor of the model, by name. One that is not there is left out.

    Raises:
        KdlibError: metadata that are missing, damaged or would run code; none of the tensors; several such models; a tensor
            beside the model's that is no state of an optimizer, or of another shape; a file that is missing or damaged.
    """
    reader = _Reader(folder)
    found = reader.read_metadata()
    names = _names(folder, found, expected)
    for name, key in names.items():
        _refuse_unfit(folder, key, found.state_dict_metadata[key], expected[name])
    state = {key: torch.empty(expected[name], dtype=found.state_dict_metadata[key].properties.dtype) for name, key in names.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, found, is_coordinator=True)
    reader.set_up_storage_reader(found, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return {name: state[key] for name, key in names.items()}


class _Reader(FileSystemReader):
    """Reads metadata without running code, only files of the folder, and tells which one is damaged."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with open(self.folder / METADATA, "rb") as file:
                found = _Unpickler(file).load()
        except KdlibError:
            raise
        except Exception as error:  # a damaged pickle raises nearly anything
            raise KdlibError(f"{self.folder / METADATA} must be readable, got {type(error).__name__}: {error}. Copy it again.") from error
        if not (isinstance(found, Metadata) and isinstance(found.state_dict_metadata, dict) and isinstance(found.storage_data, dict)):
            raise KdlibError(f"{self.folder / METADATA} must describe a checkpoint, got {type(found).__name__}. Copy it again.")
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner):
        by_file: dict[str, list] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            path = self.folder / name
            if Path(name).name != name or not path.is_file():
                raise KdlibError(f"{path} must be a file of the checkpoint, got none. Copy the whole folder.")
            try:
                done = super().read_data(dataclasses.replace(plan, items=items), planner)
            except Exception as error:  # as above
                raise KdlibError(f"{path} must be readable, got {type(error).__name__}. Copy it again.") from error
        return done


class _Unpickler(pickle.Unpickler):
    """Makes what metadata of checkpoints consist of, none of which runs code."""

    ALLOWED = {("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size")}
    PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED or (module == metadata.__name__ and name in _DESCRIPTIONS):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in self.PATHS:
            return pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath  # where it was saved, which is not read
        raise KdlibError(f"{METADATA} of a checkpoint must only describe tensors, got {module}.{name}, which could run code. Do not load it.")


_DESCRIPTIONS = {*metadata.__all__, "_MEM_FORMAT_ENCODING"}


def _names(folder: Path, found: Metadata, expected: Mapping[str, torch.Size]) -> dict[str, str]:
    """The checkpoint's key of each of the model's tensors that it holds."""
    keys = {".".join(part for part in key.split(".") if part not in WRAPPERS): key for key in found.state_dict_metadata}
    if len(keys) < len(found.state_dict_metadata):
        twice = sorted(set(found.state_dict_metadata) - set(keys.values()))
        raise KdlibError(f"{folder} must hold each tensor once, got {_some(twice)} with a wrapper's name and without. Save the model alone.")
    places = Counter()
    for key in keys:
        parts = key.split(".")
        for number in range(len(parts)):
            if ".".join(parts[number:]) in expected and not any(part.startswith("optim") for part in parts[:number]):
                places["".join(f"{part}." for part in parts[:number])] += 1
    most = max(places.values(), default=0)
    best = [place for place, count in places.items() if count == most]
    if len(best) != 1:
        told = "none of its tensors" if not best else f"{len(best)} such models, below {', '.join(map(repr, sorted(best)))}"
        raise KdlibError(f"{folder} must hold one model of its config.json, got {told}. Save the model alone.")
    (place,) = best
    inside = {key.removeprefix(place): key for key in keys if key.startswith(place)}
    # Numbers that training keeps are no tensors; at the top, the state of an optimizer is beside the model's own.
    others = [
        name
        for name, key in inside.items()
        if name not in expected and isinstance(found.state_dict_metadata[keys[key]], TensorStorageMetadata) and not name.startswith("optim")
    ]
    if others:
        raise KdlibError(f"{folder} must hold the tensors of its config.json, got {_some(others)} beside them. Give the right config.json.")
    return {name: keys[key] for name, key in inside.items() if name in expected}


def _refuse_unfit(folder: Path, key: str, found: Any, shape: torch.Size) -> None:
    if not isinstance(found, TensorStorageMetadata):
        raise KdlibError(f"{key} in {folder} must be a tensor, got other data. Give the right config.json.")
    if found.size != shape:
        raise KdlibError(f"{key} in {folder} must have shape {list(shape)}, got {list(found.size)}. Give the right config.json.")
    if sum(math.prod(chunk.sizes) for chunk in found.chunks) < math.prod(shape):
        raise KdlibError(f"{key} in {folder} must be there in full, got a part of it. Copy the whole folder.")


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
