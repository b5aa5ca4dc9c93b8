"""The GPU kernels in Triton: everything of a layer in which the tasks of one batch differ.

Each works on *tiles*: up to `BM` neighbouring rows of one segment, listed as (segment, first row,
end) in `tiles [T, 3]`; a tile of no rows does nothing. What a segment's task has is found through
`table [S, FIELDS]`, addresses and counts of one layer: backbone weights with a list of neuron
numbers, or slices that are the task's own. So one launch serves cold and hot tasks side by side,
and a task's weights are never copied for a batch.

`inner` gathers the rows of W_in that a task keeps, `[H]` contiguous numbers each, and multiplies;
bias, low-rank delta, activation and scale are its epilogue. `outer` does the same with W_out, over
whose rows it sums. Products are of fp16, bf16 or fp32 numbers, sums in fp32. The reference of all
is `model_store.ops.TorchOps`; `TRITON_INTERPRET=1` runs them on the CPU.

Letters as in `ops.py`; `R` is a rank, filled up to a multiple of 16.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# The columns of a table.
W_IN = tl.constexpr(0)  # address of [F or K, H]
B_IN = tl.constexpr(1)  # [F or K]
W_OUT = tl.constexpr(2)  # [F or K, H]
B_OUT = tl.constexpr(3)  # [H]
KEPT = tl.constexpr(4)  # K
NEURONS = tl.constexpr(5)  # address of [K] int16 or int32
LISTED = tl.constexpr(6)  # K, or 0: the weights are the task's own, and no numbers are listed
SCALE = tl.constexpr(7)  # address of [K]
SCALED = tl.constexpr(8)  # K, or 0: no scale
DELTAS = tl.constexpr(9)  # six of: address of down [r, I], address of up [O, r], r or 0
NORMS = tl.constexpr(27)  # two of: addresses of weight [H] and bias [H], or 0
FIELDS = 31

BLOCK = tl.constexpr(64)
"""`inner` fills every row of neurons up to a multiple of this with zeros: `outer` needs no mask."""


OPTIONS = {"enable_fp_fusion": True}
"""Of every launch: products and sums may be one instruction, which Triton asks to be told."""


def configs() -> list[triton.Config]:
    """What is tried once for each kind of batch on the GPU at hand."""
    return [
        triton.Config({"BN": columns, "BK": depth}, num_warps=warps, num_stages=stages)
        for columns, depth, warps, stages in (
            (32, 64, 4, 4),
            (64, 64, 4, 4),
            (128, 32, 4, 4),
            (128, 64, 4, 3),
            (128, 64, 8, 3),
            (128, 64, 8, 4),
            (256, 64, 8, 3),
        )
    ]


def tuned(kernel):
    """The kernel with the fastest of `configs`; in the interpreter, one that reaches every mask."""
    jitted = triton.jit(kernel)
    if INTERPRETED.value:
        return lambda grid: (
            lambda *args, **named: jitted[grid({"BN": 32})](*args, **named, BN=32, BK=32)
        )
    best = triton.autotune(configs(), ["crowd", "H", "BM", "RANK"], cache_results=True)(jitted)
    return lambda grid: best[grid]


@triton.jit
def product(a, b, acc):
    """`acc + a @ b`, where fp32 stays fp32."""
    if INTERPRETED:  # it takes bf16 for integers here
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def neuron_rows(field, places, NARROW: tl.constexpr):
    """Rows of the weights that hold a task's neurons at `places`, below K."""
    listed = tl.load(field + LISTED)
    address = tl.load(field + NEURONS)
    numbers = address.to(tl.pointer_type(tl.int16 if NARROW else tl.int32))
    rows = tl.load(numbers + places, mask=places < listed, other=0).to(tl.int32)
    return tl.where(places < listed, rows, places)


@triton.jit
def with_delta(
    acc, low, rows, valid, field, SLOT: tl.constexpr, places, inside, RANK: tl.constexpr
):
    """`acc [BM, BN]` and what a low-rank delta, whose first product is `low`, adds at `places`."""
    rank = tl.load(field + DELTAS + 3 * SLOT + 2)
    up = tl.load(field + DELTAS + 3 * SLOT + 1).to(tl.pointer_type(low.dtype.element_ty))
    ranks = tl.arange(0, RANK)
    a = tl.load(low + rows[:, None] * RANK + ranks[None, :], mask=valid[:, None], other=0.0)
    wanted = (ranks[:, None] < rank) & inside[None, :]
    b = tl.load(up + places[None, :] * rank + ranks[:, None], mask=wanted, other=0.0)
    return product(a, b, acc)


def _inner(
    x,  # [n, H]
    low,  # [n, RANK], where RANK is not 0
    y,  # [n, width]
    tiles,
    table,
    width,  # a multiple of BLOCK
    crowd,
    H: tl.constexpr,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NARROW: tl.constexpr,
    FIELDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Neurons after activation and scale, one tile of rows by `BN` neurons."""
    tile = tiles + 3 * tl.program_id(0)
    first, end = tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    field = table + tl.load(tile) * FIELDS
    kept = tl.load(field + KEPT).to(tl.int32)
    if tl.program_id(1) * BN >= tl.cdiv(kept, BLOCK) * BLOCK:
        return
    kind = x.dtype.element_ty
    rows = first + tl.arange(0, BM)
    valid = rows < end
    places = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = places < kept
    # Places past the last neuron read it again: no mask in the loop, and nothing of it is stored.
    numbers = neuron_rows(field, tl.minimum(places, kept - 1), NARROW)
    weights = tl.multiple_of(tl.load(field + W_IN).to(tl.pointer_type(kind)), 16)
    safe = tl.minimum(rows, end - 1)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, H, BK):
        deep = start + tl.arange(0, BK)
        if H % BK == 0:
            a = tl.load(x + safe[:, None] * H + deep[None, :])
            w = tl.load(weights + numbers[None, :] * H + deep[:, None])
        else:
            a = tl.load(x + safe[:, None] * H + deep[None, :], mask=deep[None, :] < H, other=0.0)
            w = tl.load(
                weights + numbers[None, :] * H + deep[:, None], mask=deep[:, None] < H, other=0.0
            )
        acc = product(a, w, acc)
    if RANK > 0:
        acc = with_delta(acc, low, rows, valid, field, 0, places, inside, RANK)
    bias = tl.load(field + B_IN).to(tl.pointer_type(kind))
    acc = activated(acc + tl.load(bias + numbers).to(tl.float32)[None, :], ACTIVATION)
    scale = tl.load(field + SCALE).to(tl.pointer_type(kind))
    scaled = tl.load(field + SCALED)
    acc *= tl.load(scale + places, mask=places < scaled, other=1.0).to(tl.float32)[None, :]
    acc = tl.where(inside[None, :], acc, 0.0)
    filled = places < tl.cdiv(kept, BLOCK) * BLOCK
    into = y + rows.to(tl.int64)[:, None] * width + places[None, :]
    tl.store(into, acc.to(kind), mask=valid[:, None] & filled[None, :])


def _outer(
    x,  # [n, width], zeros from K to the next multiple of BLOCK
    low,  # [n, RANK], where RANK is not 0
    y,  # [n, H]
    tiles,
    table,
    width,
    crowd,
    H: tl.constexpr,
    RANK: tl.constexpr,
    NARROW: tl.constexpr,
    FIELDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The neurons' sum, one tile of rows by `BN` of the H outputs."""
    tile = tiles + 3 * tl.program_id(0)
    first, end = tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    field = table + tl.load(tile) * FIELDS
    kept = tl.load(field + KEPT).to(tl.int32)
    kind = x.dtype.element_ty
    rows = first + tl.arange(0, BM)
    valid = rows < end
    safe = tl.minimum(rows, end - 1).to(tl.int64)
    outputs = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = outputs < H
    weights = tl.multiple_of(tl.load(field + W_OUT).to(tl.pointer_type(kind)), 16)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, kept, BK):
        places = start + tl.arange(0, BK)
        numbers = neuron_rows(field, tl.minimum(places, kept - 1), NARROW)
        a = tl.load(x + safe[:, None] * width + places[None, :])
        at = weights + numbers[:, None] * H + outputs[None, :]
        w = tl.load(at) if H % BN == 0 else tl.load(at, mask=inside[None, :], other=0.0)
        acc = product(a, w, acc)
    if RANK > 0:
        acc = with_delta(acc, low, rows, valid, field, 1, outputs, inside, RANK)
    bias = tl.load(field + B_OUT).to(tl.pointer_type(kind))
    acc += tl.load(bias + outputs, mask=inside, other=0.0).to(tl.float32)[None, :]
    into = y + rows.to(tl.int64)[:, None] * H + outputs[None, :]
    tl.store(into, acc.to(kind), mask=valid[:, None] & inside[None, :])


inner = tuned(_inner)
outer = tuned(_outer)


@triton.jit
def shrink(
    x,  # [n, I]
    low,  # [n, RANK]
    tiles,
    table,
    inputs,  # I, or less where a segment's x is narrower: KEPT_WIDE
    stride,
    KEPT_WIDE: tl.constexpr,
    SLOT: tl.constexpr,
    RANK: tl.constexpr,
    FIELDS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """A delta's first product, `x @ down.T`; zeros for a segment without the delta."""
    tile = tiles + 3 * tl.program_id(0)
    first, end = tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    field = table + tl.load(tile) * FIELDS
    if KEPT_WIDE:
        inputs = tl.load(field + KEPT).to(tl.int32)
    rank = tl.load(field + DELTAS + 3 * SLOT + 2)
    down = tl.load(field + DELTAS + 3 * SLOT).to(tl.pointer_type(x.dtype.element_ty))
    rows = first + tl.arange(0, BM)
    valid = rows < end
    ranks = tl.arange(0, RANK)
    acc = tl.zeros((BM, RANK), dtype=tl.float32)
    if rank > 0:
        for start in range(0, inputs, BK):
            deep = start + tl.arange(0, BK)
            at = rows.to(tl.int64)[:, None] * stride + deep[None, :]
            a = tl.load(x + at, mask=valid[:, None] & (deep[None, :] < inputs), other=0.0)
            wanted = (ranks[None, :] < rank) & (deep[:, None] < inputs)
            b = tl.load(down + ranks[None, :] * inputs + deep[:, None], mask=wanted, other=0.0)
            acc = product(a, b, acc)
    into = low + rows[:, None] * RANK + ranks[None, :]
    tl.store(into, acc.to(low.dtype.element_ty), mask=valid[:, None])


@triton.jit
def expand(
    y,  # [n, O]: a projection, onto a copy of which the delta goes
    low,  # [n, RANK]
    z,  # [n, O]
    tiles,
    table,
    outputs,  # O
    stride,  # of y
    SLOT: tl.constexpr,
    RANK: tl.constexpr,
    FIELDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """A delta's second product added to the projection that it stands beside."""
    tile = tiles + 3 * tl.program_id(0)
    first, end = tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    field = table + tl.load(tile) * FIELDS
    rows = first + tl.arange(0, BM)
    valid = rows < end
    places = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = places < outputs
    mask = valid[:, None] & inside[None, :]
    at = rows.to(tl.int64)[:, None] * stride + places[None, :]
    acc = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    acc = with_delta(acc, low, rows, valid, field, SLOT, places, inside, RANK)
    into = z + rows.to(tl.int64)[:, None] * outputs + places[None, :]
    tl.store(into, acc.to(z.dtype.element_ty), mask=mask)


@triton.jit
def add_norm(
    x,  # [n, H]
    residual,  # [n, H]
    weight,  # [H]
    bias,  # [H]
    y,  # [n, H]
    segments,  # [n] int32: the segment of each row, where OWN
    table,
    eps,
    OWN: tl.constexpr,
    WHICH: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """LayerNorm of the sum of two rows; with OWN, by the norm of the row's task if it has one."""
    row = tl.program_id(0).to(tl.int64)
    kind = x.dtype.element_ty
    places = tl.arange(0, WIDTH)
    inside = places < H
    total = tl.load(x + row * H + places, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + row * H + places, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / H
    centred = tl.where(inside, total - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / H
    if OWN:
        field = table + tl.load(segments + row) * FIELDS + NORMS + 2 * WHICH
        own_weight, own_bias = tl.load(field), tl.load(field + 1)
        if own_weight != 0:
            weight, bias = own_weight.to(tl.pointer_type(kind)), own_bias.to(tl.pointer_type(kind))
    factor = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + places, mask=inside, other=0.0).to(tl.float32)
    result = centred / tl.sqrt(variance + eps) * factor + shift
    tl.store(y + row * H + places, result.to(kind), mask=inside)
