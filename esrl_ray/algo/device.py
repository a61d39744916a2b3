"""Where learning computes, and what that offers: transfers without waiting, `torch.compile`, CUDA graphs."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from esrl_ray.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """The device of `learner.device`; `auto` is the GPU when there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def moved(column: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The column on the device; to a GPU through pinned memory, without waiting for it."""
    if device.type == "cuda" and column.device.type == "cpu":
        column = column.pin_memory()
    return column.to(device, non_blocking=True)


def compiled(function: Callable[P, T], device: torch.device) -> Callable[P, T]:
    """The function as `torch.compile` makes it at its first call; on a GPU in CUDA graphs.

    Raises:
        ConfigError: it could not: this machine lacks what compiles C++.
    """
    if missing := missing_for_compile():
        raise ConfigError(f"torch.compile needs {missing}, which this machine lacks", "learner.compile", "install it, or set false")
    made: Callable[P, T] = torch.compile(function, mode="reduce-overhead" if device.type == "cuda" else None)
    return made


def missing_for_compile() -> str | None:
    """What `torch.compile` needs and does not find here: it writes C++ for a CPU, and launchers in C for a GPU."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"a C++ compiler ({compiler}; CXX names another)"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return None if headers.exists() else f"Python's headers ({headers.name})"
