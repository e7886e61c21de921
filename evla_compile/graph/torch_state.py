"""torch's global settings, set to known values while a policy is captured, rewritten, run or exported.

A caller may have switched on mixed precision, TF32, another default dtype or device. None of that may reach what this
package computes: a manifest names the artifact's precision, and runtimes are compared with its recorded outputs.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.overrides import _pop_mode, _push_mode
from torch.utils import _device

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
"""Device types whose autocast is switched off."""

_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
"""Settings of float32 arithmetic that others inherit where these say "none", outermost first."""

_LEAVES = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))
"""Settings of float32 arithmetic by backend and kind of operator."""


@contextmanager
def own_torch_state() -> Iterator[None]:
    """Run a block, or as a decorator a function, under this package's own torch settings, and restore the caller's.

    Autocast is off, float32 products and convolutions are computed in full (no TF32, no bfloat16), new tensors are
    float32 and on the CPU by default, modes that intercept torch functions are set aside, and there are neither
    gradients nor inference tensors. Deterministic algorithms, thread counts and the choice of attention kernels stay
    the caller's, and so do dispatch modes, which count or trace operators.

    Blocks may be nested and may overlap in several threads. Default dtype and float32 arithmetic are settings of the
    whole process: while any block runs, other threads see them too. Every block sets them as it is entered, and the
    last of overlapping ones restores what the first found: what other code sets in between does not last.
    """
    with ExitStack() as stack:
        stack.enter_context(_process_state)
        stack.enter_context(_without_function_modes())
        stack.enter_context(_without_autocast())
        stack.enter_context(torch.inference_mode(False))  # switches gradients on
        stack.enter_context(torch.no_grad())
        yield


def traceable_torch_state(device: torch.device) -> AbstractContextManager[object]:
    """Return `own_torch_state()` for a function that may be traced by torch.compile or torch.export.

    A trace cannot contain a change of global settings, except that autocast on `device` is off; all other settings must
    be set by the caller of the traced graph.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.autocast(device.type, enabled=False)
    if torch.compiler.is_compiling():
        return nullcontext()
    return own_torch_state()


@contextmanager
def _without_autocast() -> Iterator[None]:
    enabled = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
    for device in enabled:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device in enabled:
            torch.set_autocast_enabled(device, True)


@contextmanager
def _without_function_modes() -> Iterator[None]:
    """Set aside the thread's modes that intercept torch functions; a default device is one of them."""
    count = torch._C._len_torch_function_stack()
    modes = [_pop_mode() for _ in range(count)]  # type: ignore[no-untyped-call]  # torch left it so
    device, _device.CURRENT_DEVICE = _device.CURRENT_DEVICE, None
    try:
        yield
    finally:
        _device.CURRENT_DEVICE = device
        for mode in reversed(modes):
            _push_mode(mode)  # type: ignore[no-untyped-call]  # as above


@dataclass(frozen=True, slots=True)
class _Float32Arithmetic:
    """How the process computes float32 products and convolutions."""

    settings: tuple[tuple[tuple[str, str], str], ...]
    """Every setting by itself, inheritance set aside; leaves first, outermost parent last."""
    matmul: str
    """The older setting `torch.set_float32_matmul_precision`."""
    cudnn: bool
    """The older setting `torch.backends.cudnn.allow_tf32`."""

    def restore(self) -> None:
        """Set all of it again."""
        torch.set_float32_matmul_precision(self.matmul)  # the older settings write leaves too
        torch._C._set_cudnn_allow_tf32(self.cudnn)
        for key, value in self.settings:
            torch._C._set_fp32_precision_setter(*key, value)


def _compute_float32_in_full() -> _Float32Arithmetic:
    """Switch off everything below full float32; return what it was."""
    settings = []
    for key in (*_PARENTS, *_LEAVES):  # a setting that inherits shows its own value once its parents say "none"
        settings.append((key, torch._C._get_fp32_precision_getter(*key)))
        if key in _PARENTS:
            torch._C._set_fp32_precision_setter(*key, "none")
    for key in _LEAVES:
        torch._C._set_fp32_precision_setter(*key, "none")
    found = _Float32Arithmetic(
        settings=tuple(reversed(settings)), matmul=torch.get_float32_matmul_precision(), cudnn=_cudnn_allows_tf32()
    )
    torch.set_float32_matmul_precision("highest")
    torch._C._set_cudnn_allow_tf32(False)
    return found


def _cudnn_allows_tf32() -> bool:
    """Return the older setting while the newer ones say "none": torch raises an error where the two disagree."""
    try:
        allowed: bool = torch._C._get_cudnn_allow_tf32()
    except RuntimeError:
        return True
    return allowed


class _ProcessState:
    """Settings of the whole process: set by every block; the last restores what the first found."""

    def __init__(self) -> None:
        self._lock, self._blocks = threading.Lock(), 0
        self._arithmetic: _Float32Arithmetic | None = None  # of before the first block
        self._dtype = torch.float32

    def __enter__(self) -> None:
        with self._lock:
            dtype, arithmetic = torch.get_default_dtype(), _compute_float32_in_full()
            torch.set_default_dtype(torch.float32)
            if not self._blocks:
                self._dtype, self._arithmetic = dtype, arithmetic
            self._blocks += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                torch.set_default_dtype(self._dtype)
                if self._arithmetic is not None:
                    self._arithmetic.restore()


_process_state = _ProcessState()
