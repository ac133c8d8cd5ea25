"""CPU tensors that claim to stand on an accelerator: what would fail on a GPU fails here, without one.

Importing this module registers the device type ``pretended``, with two devices, for the whole process. A tensor there
is a :class:`Placed` around a CPU tensor that does the computing. Inside :class:`Accelerator` tensors can be made on
such a device; operations whose tensors stand on different devices raise :class:`Mismatch`, except those that CUDA
allows (zero-dimensional CPU tensors, CPU indices, copies).

``SYNCS`` counts, by line of this project, where the host waits for the device: values, shapes that depend on values,
and copies to the host. ``UPLOADS`` counts copies to the device in the same way: from pageable memory they wait too.

What it cannot notice: whatever kernels decide (precision, missing dtypes, order of parallel sums, races, streams),
memory, branches on ``device.type == "cuda"``, device-to-device copies that are slow, and waits inside kernels.
``torch.inference_mode`` is ``no_grad`` here: its tensors cannot be wrapped.

It leans on internals of the torch pinned in requirements.txt: the private-use backend in Python, wrapper subclasses,
and which operators reach a dispatch mode.
"""

from __future__ import annotations

import collections
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME, DEVICES = "pretended", 2
CPU = torch.device("cpu")
PROJECT = tuple(str(Path(__file__).parents[2] / package) for package in ("nuwa", "pipelines"))
SYNCS: collections.Counter[str] = collections.Counter()
UPLOADS: collections.Counter[str] = collections.Counter()

ATEN = torch.ops.aten
COPY = id(ATEN.copy_.default)
COPIES = {COPY, id(ATEN._to_copy.default), id(ATEN.lift_fresh.default)}
INDEXING = {
    id(operator)
    for operator in (
        ATEN.index.Tensor,
        ATEN.index_put.default,
        ATEN.index_put_.default,
        ATEN._index_put_impl_.default,
        ATEN._unsafe_index.Tensor,
    )
}
WAITING = {
    id(operator)
    for operator in (
        ATEN._local_scalar_dense.default,
        ATEN.nonzero.default,
        ATEN.masked_select.default,
        ATEN.bincount.default,
        ATEN.equal.default,
        ATEN._unique2.default,
        ATEN.unique_consecutive.default,
        ATEN.unique_dim.default,
        ATEN.repeat_interleave.Tensor,
    )
}


class Mismatch(RuntimeError):
    """Tensors of one operation stand on different devices."""


class _Module:
    """What ``torch.pretended`` offers."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return DEVICES

    def manual_seed_all(self, seed: int) -> None:
        """Nothing here draws on the device."""

    def _is_in_bad_fork(self) -> bool:
        return False


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def has_primary_context(self, device: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1

    def device_count(self) -> int:
        return DEVICES


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hooks(), device_guard=_Guard())
# On the class: functions decorated before this import enter it too.
torch.inference_mode.__enter__ = torch.no_grad.__enter__
torch.inference_mode.__exit__ = torch.no_grad.__exit__


class Placed(torch.Tensor):
    """``inner``, a CPU tensor, as if it stood on ``device``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Placed:
        placed = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        placed.inner = inner
        return placed

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})

    def tolist(self) -> Any:
        _count(SYNCS)
        return self.inner.tolist()

    def numpy(self, **_options: Any) -> Any:
        raise TypeError(f"a tensor on {self.device} is no numpy array; copy it to the CPU first")

    def __repr__(self, **_options: Any) -> str:
        return f"Placed({self.device}, {tuple(self.shape)}, {self.dtype})"


class Accelerator(TorchDispatchMode):
    """Within it, tensors can be made on and copied to ``pretended:0`` and ``pretended:1``."""

    def __enter__(self) -> Accelerator:
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made on the CPU, then copied
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.before)
        super().__exit__(*error)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and a guard around each operator takes longer than many of them


def on_device(model: torch.nn.Module) -> torch.nn.Module:
    """A copy on the first device."""
    with Accelerator():
        return copy.deepcopy(model).to(f"{NAME}:0")


def _run(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run ``operator`` on the CPU; its results stand where CUDA would leave them."""
    tensors: list[torch.Tensor] = []
    inner_args = _inner(args, tensors)
    inner_kwargs = dict(zip(kwargs, _inner(tuple(kwargs.values()), tensors), strict=True)) if kwargs else kwargs

    key = id(operator)  # they are single objects, and slow to hash
    device = tensors[0].device if key in COPIES else _common_device(operator, args, tensors)
    waits = device != CPU and key in WAITING
    if key == COPY:
        waits = device == CPU and tensors[-1].device != CPU
        if device != CPU and tensors[-1].device == CPU:
            _count(UPLOADS)
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        asked = torch.device(NAME, asked.index or 0) if asked.type == NAME else asked
        waits |= bool(tensors) and asked == CPU != device
        device = asked
        if tensors and device.type == NAME and tensors[0].device == CPU:
            _count(UPLOADS)
    if waits:
        _count(SYNCS)
    return _placed(operator(*inner_args, **inner_kwargs), device, tensors)


def _inner(values: tuple | list, tensors: list[torch.Tensor]) -> tuple | list:
    """``values`` as they run on the CPU: of a tensor its numbers, of every device the CPU; ``tensors`` grows by theirs.

    One walk by hand: it runs for every operator, and torch's own trees would take most of the time of that.
    """
    found = []
    for value in values:
        kind = type(value)
        if kind is Placed:
            tensors.append(value)
            value = value.inner
        elif kind is list or kind is tuple:
            value = _inner(value, tensors)
        elif kind is torch.device:
            value = CPU
        elif isinstance(value, torch.Tensor):
            tensors.append(value)
        found.append(value)
    return found if type(values) is list else tuple(found)


def _placed(value: Any, device: torch.device, given: list[torch.Tensor]) -> Any:
    """What an operator returned, on ``device``; operations in place return what they were ``given``."""
    if isinstance(value, torch.Tensor):
        for one in given:
            if one is value or (type(one) is Placed and one.inner is value):
                return one
        return value if device == CPU else Placed(value, device)
    if type(value) in (list, tuple):
        return type(value)(_placed(one, device, given) for one in value)
    return value


def _common_device(operator: Any, args: tuple, tensors: list[torch.Tensor]) -> torch.device:
    """Where all ``tensors`` stand; raises :class:`Mismatch`."""
    if id(operator) in INDEXING:
        indexed, indices, values = args[0], [one for one in args[1] if one is not None], args[2:3]
        if indexed.device != CPU and any(one.dtype == torch.bool for one in indices):
            _count(SYNCS)
        tensors = [indexed, *values, *(one for one in indices if one.device != CPU)]
    found = {one.device for one in tensors if one.ndim or one.device != CPU}
    if len(found) > 1:
        stand = ", ".join(f"{tuple(one.shape)} on {one.device}" for one in tensors)
        raise Mismatch(f"{operator} mixes devices: {stand}")
    return next(iter(found), CPU)


def _count(counter: collections.Counter[str]) -> None:
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(PROJECT):
        frame = frame.f_back
    counter["elsewhere" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1
