"""The model that a word on the command line means.

    ./config.json, ./folder     Hugging Face: the class that ``architectures`` names, else the one of `AutoModel`
    timm:resnet50, resnet50     timm
    module:callable             a function or class of the user's that returns a module; or a module itself

Models are made on the meta device, so they have no values and take no memory, and nothing is ever downloaded.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spcompile.errors import CommandError

CONFIG = "config.json"

WITH_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""``module:callable``, both with dots."""

META = re.compile(r"\bmeta (device type )?tensor|device meta\b")
"""How torch refuses to look at a value that is not there, in several places."""


def make_model(target: str, *, dtype: torch.dtype | None = None, real: bool = False) -> nn.Module:
    """Make the model that ``target`` means.

    Args:
        target: see the module docstring.
        dtype: of its floating-point weights; None: what the model says.
        real: make it with values, on the CPU.

    Raises:
        CommandError: there is no such model, or it cannot be made.
    """
    device = nullcontext() if real else torch.device("meta")
    path = Path(target).expanduser()
    if target.startswith("timm:"):
        make, is_own_dtype = _timm_maker(target.removeprefix("timm:")), False
    elif path.exists():
        make, is_own_dtype = _hugging_face_maker(path, dtype), True
    elif target.endswith(".json") or "/" in target:
        raise CommandError(
            f"there is no file or folder {target!r}: nothing is downloaded, so MODEL must be a {CONFIG} or its folder "
            "on this machine, timm:NAME, or module:callable"
        )
    elif WITH_CODE.fullmatch(target):
        make, is_own_dtype = _own_maker(target), False
    else:
        make, is_own_dtype = _bare_maker(target), False
    with device:
        model = make()
    return model if dtype is None or is_own_dtype else model.to(dtype)


def find_dtype(name: str) -> torch.dtype:
    """A floating-point dtype by its name in torch.

    Raises:
        CommandError: there is none.
    """
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CommandError(f"--dtype must be a floating-point dtype such as bfloat16, float16 or float32, not {name!r}")
    return dtype


# Hugging Face.


def _hugging_face_maker(path: Path, dtype: torch.dtype | None) -> Callable[[], nn.Module]:
    file = path / CONFIG if path.is_dir() else path
    fields = _read_config(file)
    os.environ["HF_HUB_OFFLINE"] = "1"  # some models would fetch a backbone
    try:
        import transformers
    except ImportError as error:
        raise CommandError(f"{path} needs transformers, which is not installed: pip install transformers") from error
    config = _config(transformers, file, fields)
    names = fields.get("architectures") or []
    kind = None
    if names:
        kind = getattr(transformers, str(names[0]), None)
        if kind is None:
            raise CommandError(
                f"{file} names the architecture {names[0]!r}, which transformers {transformers.__version__} does not "
                "have: install a newer transformers, or write a function that makes it and give module:function"
            )
    own_dtype = dtype or _dtype_of(config)

    def make() -> nn.Module:
        with _default_dtype(own_dtype), _told(f"{file} does not make a model"):
            model: nn.Module = transformers.AutoModel.from_config(config) if kind is None else kind(config)
            return model

    return make


def _read_config(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CommandError(f"there is no {CONFIG} in {file.parent}: give a folder that has one") from error
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CommandError(f"{file} is not JSON ({error}): MODEL must be the {CONFIG} of a model") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        problem = (
            "it is of diffusers" if isinstance(fields, dict) and "_class_name" in fields else "it has no model_type"
        )
        raise CommandError(
            f"{file} is not the config of a transformers model: {problem} (write a function that makes the model, and "
            "give module:function)"
        )
    return fields


def _config(transformers: Any, file: Path, fields: dict[str, Any]) -> Any:
    if fields["model_type"] not in transformers.CONFIG_MAPPING:
        problem = "it needs code of its own" if "auto_map" in fields else "install a newer transformers"
        raise CommandError(
            f"{file} has model_type {fields['model_type']!r}, which transformers {transformers.__version__} does not "
            f"know: {problem}, or write a function that makes the model, and give module:function"
        )
    with _told(f"{file} is not a config that transformers {transformers.__version__} reads"):
        return transformers.AutoConfig.from_pretrained(str(file), local_files_only=True, trust_remote_code=False)


def _dtype_of(config: Any) -> torch.dtype:
    """That of the config, under the name that this transformers uses; fp32 where it says nothing."""
    dtype = getattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Weights are made in this dtype; what a model makes in fp32 of its own accord (rotary tables) stays so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# timm.


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError:
        return None


def _timm_maker(name: str) -> Callable[[], nn.Module]:
    timm = _import_timm()
    if timm is None:
        raise CommandError(f"timm:{name} needs timm, which is not installed: pip install timm")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists what it has"
        raise CommandError(f"timm has no model {name!r}: {hint}")

    def make() -> nn.Module:
        with _told(f"timm cannot make {name}"):
            model: nn.Module = timm.create_model(name, pretrained=False)
            return model

    return make


def _bare_maker(name: str) -> Callable[[], nn.Module]:
    timm = _import_timm()
    if timm is not None and timm.is_model(name):
        return _timm_maker(name)
    about_timm = "no model of timm" if timm is not None else "no model of timm (which is not installed)"
    raise CommandError(
        f"{name!r} is no file or folder, not module:callable, and {about_timm}: give a {CONFIG} or its folder, "
        "timm:NAME, or module:callable"
    )


# The user's own.


def _own_maker(target: str) -> Callable[[], nn.Module]:
    module_name, _, name = target.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as for python -m: modules of the current folder
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise CommandError(_what_happened(f"importing {module_name} failed", error)) from error
        raise CommandError(
            f"there is no module {error.name!r} for {target}: run this in its folder, or put that on PYTHONPATH"
        ) from error
    except Exception as error:
        raise CommandError(_what_happened(f"importing {module_name} failed", error)) from error
    for part in name.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, dir(value), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "check the name behind the colon"
            raise CommandError(f"{module_name} has no {name!r}: {hint}")
        value = getattr(value, part)

    def make() -> nn.Module:
        made = value
        if not isinstance(made, nn.Module):
            if not callable(made):
                raise CommandError(f"{target} is of type {type(made).__name__}: give what returns a torch.nn.Module")
            with _told(f"calling {target}() failed"):
                made = made()
        if not isinstance(made, nn.Module):
            raise CommandError(
                f"{target}() returned a value of type {type(made).__name__}: it must return a torch.nn.Module"
            )
        return made

    return make


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What other people's code raises is the user's to mend: one line, with its place."""
    try:
        yield
    except Exception as error:
        raise CommandError(_what_happened(what, error)) from error


def _what_happened(what: str, error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    where = f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    hint = " (models are made without values: --real makes this one with them)" if META.search(str(error)) else ""
    return f"{what}: {type(error).__name__}: {str(error).strip() or 'no message'}{where}{hint}"
