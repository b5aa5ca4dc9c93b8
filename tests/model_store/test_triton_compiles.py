"""The kernels compiled for an H100, which needs none: to its matrix and copy instructions."""

import re
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: make setup installs it", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model_store import triton_ffn as kernels

if kernels.INTERPRETED.value:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

HOPPER = GPUTarget("cuda", 90, 32)
SIZES = {"H": 768, "NARROW": True, "FIELDS": kernels.FIELDS, "BM": 128, "BN": 128, "BK": 64}


def _ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    """Assembly of a kernel whose pointers and widths are multiples of 16, as they are in use."""
    jitted = kernel if hasattr(kernel, "arg_names") else triton.jit(kernel)
    names = jitted.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    even = [
        (place,) for place, name in enumerate(names) if name == "width" or "*" in signature[name]
    ]
    source = ASTSource(
        jitted, signature, constants, {place: [["tt.divisibility", 16]] for place in even}
    )
    options = {"num_warps": 8, "num_stages": 3, **kernels.OPTIONS}
    return str(triton.compile(source, target=HOPPER, options=options).asm["ptx"])


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["inner", "outer"])
def test_gathered_products_use_what_the_gpu_has(name: str, kind: str) -> None:
    numbers = f"*{kind}"
    types = {"x": numbers, "low": numbers, "y": numbers, "tiles": "*i32", "table": "*i64"}
    constants = SIZES | {"RANK": 0} | ({"ACTIVATION": "gelu"} if name == "inner" else {})
    kernel = {"inner": kernels._inner, "outer": kernels._outer}[name]
    ptx = _ptx(kernel, types | {"width": "i32", "crowd": "i32"}, constants)
    assert "wgmma.mma_async" in ptx
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^\n]*, 0x10", ptx)
    # Both operands, 128 x 64 numbers each for 256 threads, 8 numbers a copy: 4 + 4 copies in the
    # loop and in each of the two stages before it.
    assert len(copies) == 24


@pytest.mark.parametrize("own", [False, True])
def test_add_norm_compiles(own: bool) -> None:
    types = dict.fromkeys(("x", "residual", "weight", "bias", "y"), "*fp16")
    types |= {"segments": "*i32", "table": "*i64", "eps": "fp32"}
    constants = {"OWN": own, "WHICH": 1, "H": 768, "WIDTH": 1024, "FIELDS": kernels.FIELDS}
    assert ".entry add_norm" in _ptx(kernels.add_norm, types, constants)


def test_deltas_compile() -> None:
    common = {"RANK": 32, "FIELDS": kernels.FIELDS, "BM": 64}
    types = {"x": "*bf16", "y": "*bf16", "z": "*bf16", "low": "*bf16", "tiles": "*i32"}
    types |= {"table": "*i64", "inputs": "i32", "outputs": "i32", "stride": "i32"}
    thin = common | {"KEPT_WIDE": True, "SLOT": 1, "BK": 64}
    assert ".entry shrink" in _ptx(kernels.shrink, types, thin)
    assert ".entry expand" in _ptx(kernels.expand, types, common | {"SLOT": 2, "BN": 64})
