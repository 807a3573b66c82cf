# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles a @triton.jit function ahead of time and runs its PTX on CPU tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .floats import f32_to_bf16
from .hopper.tensor_maps import tensor_map
from .memory import Device
from .module import Module
from .ptx_types import align_up
from .stats import Stats

TFLOAT32 = 11  # element type of a tensor map
FLOAT_TYPES = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}
TYPE_NAMES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float64": "fp64",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "bool": "i1",
    "float8_e5m2": "fp8e5",
    "float8_e4m3fn": "fp8e4nv",
}
_modules: dict[Any, tuple[Any, str, Module]] = {}


class Result:
    """Holds the counters of a run, with the compiled kernel and its PTX.

    Counters are attributes of the result too.
    """

    def __init__(self, stats: Stats, kernel: Any, ptx: str) -> None:
        self.stats, self.kernel, self.ptx = stats, kernel, ptx

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stats, name)

    def __str__(self) -> str:
        return str(self.stats)


# ---- what Triton does when it launches
class Specialisation(NamedTuple):
    """Holds what Triton compiles a function for, and the names of the arguments that remain."""

    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[Any]]
    runtime: list[str]

    def key(self) -> tuple[str, ...]:
        """Returns what tells specialisations apart."""
        parts = self.signature, self.constants, self.attributes
        return tuple(repr(sorted(part.items(), key=lambda item: item[0])) for part in parts)


def _type_name(array: Any) -> str:
    """Returns Triton's name of the type of a tensor's or array's elements."""
    return TYPE_NAMES[str(array.dtype).removeprefix("torch.")]


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return True
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "data_ptr")


def _is_descriptor(value: Any) -> bool:
    return hasattr(value, "block_shape")


def _unwrap(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the function inside autotuners and heuristics, with heuristic values filled in."""
    while not hasattr(fn, "cache_key"):
        for name, heuristic in (getattr(fn, "values", None) or {}).items():
            if name not in kwargs:
                named = dict(zip(fn.arg_names, args, strict=False))
                kwargs[name] = heuristic({**named, **kwargs})
        fn = fn.fn
    return fn, kwargs


def _bind(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the argument of each parameter."""
    names = [p.name for p in fn.params]
    bound = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise TypeError(f"{name} is not an argument of the kernel")
        bound[name] = value
    for p in fn.params:
        if p.name not in bound:
            if not p.has_default:
                raise TypeError(f"missing argument {p.name}")
            bound[p.name] = p.default
    return bound


def specialise(fn: Any, bound: dict[str, Any], addresses: dict[str, int]) -> Specialisation:
    """Returns what Triton would compile for these arguments, following its launch-time rules."""
    result = Specialisation({}, {}, {}, [])
    for i, p in enumerate(fn.params):
        value = bound[p.name]
        specialised = not p.do_not_specialize
        one = type(value) is not bool and isinstance(value, (int, np.integer)) and value == 1
        if p.is_constexpr or value is None or (specialised and one):
            result.signature[p.name] = "constexpr"
            result.constants[p.name] = 1 if one and not p.is_constexpr else value
            continue
        result.signature[p.name] = _signature_of(p, value)
        number = addresses[p.name] if _is_array(value) else value
        counts = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
        if specialised and not p.do_not_specialize_on_alignment and counts and number % 16 == 0:
            result.attributes[(i,)] = [["tt.divisibility", 16]]
        result.runtime.append(p.name)
    return result


def _signature_of(param: Any, value: Any) -> str:
    annotated = getattr(param, "annotation_type", None) or None
    if _is_array(value):
        return ("*k" if getattr(param, "is_const", False) else "*") + _type_name(value)
    if _is_descriptor(value):
        block = ", ".join(str(n) for n in value.block_shape)
        return f"tensordesc<{_type_name(value.base)}[{block}]>"
    if isinstance(value, bool):
        return annotated or "u1"
    if isinstance(value, (int, np.integer)):
        value = int(value)
        fitting = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        return annotated or fitting
    if isinstance(value, (float, np.floating)):
        return annotated or "fp32"
    raise TypeError(f"argument {param.name}: {type(value).__name__} is not supported")


def compile_kernel(fn: Any, special: Specialisation, target: int, options: dict[str, Any]) -> Any:
    """Returns the kernel that Triton compiles for sm_<target>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=fn,
        signature=special.signature,
        constexprs=special.constants,
        attrs=special.attributes,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _compiled(
    fn: Any, special: Specialisation, target: int, options: dict[str, Any]
) -> tuple[Any, str, Module]:
    """Returns kernel, PTX and module, from an earlier call where possible."""
    key = (fn.cache_key, *special.key(), target, repr(sorted(options.items())))
    if key not in _modules:
        kernel = compile_kernel(fn, special, target, options)
        ptx = kernel.asm["ptx"]
        ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
        _modules[key] = (kernel, ptx, Module.from_ptx(ptx))
    return _modules[key]


# ---- arguments
def _map_arguments(device: Device, bound: dict[str, Any]) -> dict[str, int]:
    """Maps arrays and the tensors of descriptors into device memory; returns their addresses."""
    addresses = {}
    for name, value in bound.items():
        if _is_array(value):
            addresses[name] = device.alloc(value, name)
        elif _is_descriptor(value):
            addresses[name] = device.alloc(value.base, name)
    return addresses


def _scalar(value: Any, ty: str) -> Any:
    """Returns a number as the type of the kernel's parameter."""
    if ty in FLOAT_TYPES:
        return FLOAT_TYPES[ty](value)
    if ty == "bf16":
        return f32_to_bf16(np.array([value], np.float32))[0]
    return int(value)


def _descriptor(value: Any, address: int, maps: list[dict[str, Any]]) -> list[Any]:
    """Returns what Triton passes for a TensorDescriptor: a tensor map, shape and strides."""
    if not maps:
        raise NotImplementedError("tensor descriptors need target=90")
    m = maps.pop(0)
    element = TFLOAT32 if getattr(value, "round_f32_to_tf32", False) else m["elem_type"]
    if m.get("fp4_padded") or m.get("is_im2col"):
        raise NotImplementedError("tensor descriptors of fp4 elements and im2col")
    nan = value.padding == "nan"
    shape, strides = value.shape, value.strides
    encoded = tensor_map(address, shape, strides, m["block_size"], element, m["swizzle"], nan)
    return [encoded, *(int(n) for n in shape), *(int(n) for n in strides)]


def _parameters(
    device: Device,
    special: Specialisation,
    bound: dict[str, Any],
    addresses: dict[str, int],
    metadata: Any,
) -> list[Any]:
    """Returns the arguments of the compiled kernel, without scratch memory."""
    maps = list(getattr(metadata, "tensordesc_meta", None) or [])
    parameters: list[Any] = []
    for name in special.runtime:
        if _is_descriptor(bound[name]):
            parameters += _descriptor(bound[name], addresses[name], maps)
        elif name in addresses:
            parameters.append(addresses[name])
        else:
            parameters.append(_scalar(bound[name], special.signature[name]))
    return parameters


def _scratch(device: Device, metadata: Any, n_ctas: int, count: int) -> list[int]:
    """Returns addresses of the scratch memory that a kernel takes as its last parameters."""
    addresses = []
    for kind in ("global", "profile")[:count]:
        size = getattr(metadata, f"{kind}_scratch_size", 0)
        alignment = getattr(metadata, f"{kind}_scratch_align", 1)
        total = align_up(size, alignment) * n_ctas
        addresses.append(device.empty(total, "scratch") if size else 0)
    return addresses


# ---- running
def run(
    fn: Any,
    grid: Any,
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    target: int = 80,
    checks: Any = None,
    stats: bool = True,
    options: dict[str, Any] | None = None,
    max_lanes: int | None = None,
    ctas: range | None = None,
    **kwargs: Any,
) -> Result:
    """Compiles `fn` for sm_<target> and runs it on CPU tensors in place.

    Positional and keyword arguments are those of the kernel. torch CPU tensors and numpy arrays are
    pointers. `grid` is a tuple or a function of the arguments.
    """
    fn, kwargs = _unwrap(fn, args, kwargs)
    bound = _bind(fn, args, kwargs)
    device = Device()
    addresses = _map_arguments(device, bound)
    special = specialise(fn, bound, addresses)
    options = dict(num_warps=num_warps, num_stages=num_stages, **(options or {}))
    kernel, ptx, module = _compiled(fn, special, target, options)
    metadata = kernel.metadata
    if getattr(metadata, "num_ctas", 1) != 1:
        raise NotImplementedError("thread block clusters (num_ctas > 1)")
    grid = grid(dict(bound)) if callable(grid) else grid
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    if module.data:  # variables of the module must share the address space
        module = Module.from_ptx(ptx, device)
    else:
        module.device = device
    program = module.program(metadata.name)
    call = _parameters(device, special, bound, addresses, metadata)
    call += _scratch(device, metadata, int(np.prod(grid)), len(program.params) - len(call))
    try:
        # warp specialisation adds warps
        block = program.entry.reqntid or metadata.num_warps * 32
        counters = module.launch(
            metadata.name,
            grid,
            block,
            call,
            metadata.shared,
            checks=checks,
            stats=stats,
            max_lanes=max_lanes,
            ctas=ctas,
        )
    finally:
        module.device = Device()  # does not keep the caller's tensors alive
    return Result(counters, kernel, ptx)


@contextlib.contextmanager
def simulated_launches(
    target: int = 80,
    on_result: Callable[[str, Result], None] | None = None,
    **settings: Any,
) -> Iterator[None]:
    """Runs every `kernel[grid](...)` of Triton inside the context here, on CPU tensors.

    `settings` go to `run` (checks, stats, max_lanes, options). `on_result(kernel name, Result)`
    sees each launch. The code under test keeps its own launchers, which have to accept CPU tensors.
    """
    from triton.runtime.jit import JITFunction

    original = JITFunction.run
    common = dict(settings)
    common_options = common.pop("options", None) or {}

    def simulated(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Result:
        kwargs.pop("stream", None)
        options = dict(common_options)
        for name in [k for k in kwargs if k not in (*self.arg_names, "num_warps", "num_stages")]:
            options[name] = kwargs.pop(name)
        result = run(self, grid, *args, target=target, options=options, **common, **kwargs)
        if on_result is not None:
            on_result(self.__name__, result)
        return result

    JITFunction.run = simulated
    try:
        yield
    finally:
        JITFunction.run = original
