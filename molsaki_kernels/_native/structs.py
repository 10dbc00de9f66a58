"""The ctypes structs that calls of the C library take, and a check that C lays them out in the same way."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

# Constants of csrc/plan.h and csrc/simd.h.
TASK_ROWS = 192  # rows per task of a plan
MAP_TILE_ROWS = 24  # rows per tile of the map alone
COLUMN_MULTIPLE = 16  # the lists of key tokens are padded to a multiple of it
HEAD_DIM_MULTIPLE = 16
MAX_HEAD_DIM = 256
NEVER = 2**31 - 1  # the position of a padding token

# ``Unit`` of csrc/attention.h: what computes the products of an attention call.
FLOAT32, VECTORS_BF16, TILES_BF16 = range(3)

Strides = ctypes.c_int64 * 3  # batch, head and row strides of a tensor (B, H, M, D), in elements


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Plan(ctypes.Structure):
    """``Plan`` of csrc/plan.h. The tensors it points to must outlive it."""

    _fields_ = [
        *_fields(ctypes.c_int64, "sequences columns longest tasks"),
        *_fields(ctypes.c_void_p, "batch begin length tokens_used tokens word_of_token step_of_row"),
        *_fields(ctypes.c_void_p, "task_sequence task_row task_first task_count task_slot"),
    ]


class AttentionCall(ctypes.Structure):
    """``AttentionCall`` of csrc/attention.h, which describes the fields."""

    _fields_ = [
        ("plan", Plan),
        *_fields(ctypes.c_int64, "rows q_heads kv_heads head_dim value_dim steps words"),
        *_fields(ctypes.c_int64, "causal window is_bf16 per_head threads unit"),
        *_fields(Strides, "q_strides k_strides v_strides out_strides dout_strides"),
        *_fields(Strides, "dq_strides dk_strides dv_strides"),
        *_fields(ctypes.c_double, "scale softcap word_weight"),
        *_fields(ctypes.c_void_p, "q k v sinks out lse work packed"),
        ("groups", ctypes.c_int64),
        *_fields(ctypes.c_void_p, "sums maps"),
        *_fields(ctypes.c_void_p, "dout dlse dmaps delta dq dk dv parts part_of"),
    ]


class AttentionMemory(ctypes.Structure):
    """``AttentionMemory`` of csrc/attention.h: bytes for the fields of these names of :class:`AttentionCall`."""

    _fields_ = _fields(ctypes.c_int64, "work packed parts")


class MapCall(ctypes.Structure):
    """``MapCall`` of csrc/stepwise_map.c, which describes the fields."""

    _fields_ = [
        ("plan", Plan),
        *_fields(ctypes.c_int64, "q_heads kv_heads head_dim steps words"),
        *_fields(ctypes.c_int64, "causal window is_bf16 per_head threads chunk_rows chunks"),
        *_fields(Strides, "q_strides k_strides dq_strides dk_strides"),
        ("lse_strides", ctypes.c_int64 * 2),
        *_fields(ctypes.c_double, "scale word_weight"),
        *_fields(ctypes.c_void_p, "q k lse sums packed maps"),
        *_fields(ctypes.c_void_p, "dmaps upstream keys dk_parts dk_tokens kept dlse dq dk"),
    ]


class LseGradientCall(ctypes.Structure):
    """``LseGradientCall`` of csrc/lse_gradient.c, which describes the fields."""

    _fields_ = [
        *_fields(ctypes.c_int64, "batches heads rows head_dim threads"),
        *_fields(Strides, "out_strides dout_strides folded_strides dlse_strides"),
        ("vanished", ctypes.c_float),
        *_fields(ctypes.c_void_p, "out dout folded dlse"),
    ]


def mismatch(library: ctypes.CDLL) -> str | None:
    """The first difference between a struct or constant here and in the library, or None."""
    structs = (Plan, AttentionCall, AttentionMemory, MapCall, LseGradientCall)
    expected = {struct.__name__: _layout(struct) for struct in structs}
    expected["constants"] = {name: (value, 0) for name, value in constants().items()}
    for struct, python in expected.items():
        try:
            c = dict(_exported(library, f"molsaki_layout_{struct}"))
        except ValueError:
            return f"{struct}: the library has no table of its layout"
        for field in (*python, *c):
            if python.get(field) != c.get(field):
                name = f"{struct}.{field}" if field else struct
                return f"{name}: expected (offset, size) {python.get(field)} as in Python, got {c.get(field)} in C"
    return None


def constants() -> dict[str, int]:
    """The constants that the C sources and this package both have. In the table they are offsets, with size 0."""
    return {
        "TASK_ROWS": TASK_ROWS,
        "MAP_TILE_ROWS": MAP_TILE_ROWS,
        "COLUMN_MULTIPLE": COLUMN_MULTIPLE,
        "HEAD_DIM_MULTIPLE": HEAD_DIM_MULTIPLE,
        "MAX_HEAD_DIM": MAX_HEAD_DIM,
        "NEVER": NEVER,
        "FLOAT32": FLOAT32,
        "VECTORS_BF16": VECTORS_BF16,
        "TILES_BF16": TILES_BF16,
    }


class _Entry(ctypes.Structure):
    """``Layout`` of csrc/layout.h."""

    _fields_ = [("field", ctypes.c_char_p), ("offset", ctypes.c_int64), ("size", ctypes.c_int64)]


def _layout(struct: type[ctypes.Structure]) -> dict[str, tuple[int, int]]:
    """Offset and size of each field, and of the whole struct under ""."""
    descriptors = {name: getattr(struct, name) for name, *_ in struct._fields_}
    return {name: (d.offset, d.size) for name, d in descriptors.items()} | {"": (0, ctypes.sizeof(struct))}


def _exported(library: ctypes.CDLL, symbol: str) -> Iterator[tuple[str, tuple[int, int]]]:
    address = ctypes.addressof(_Entry.in_dll(library, symbol))
    while (entry := _Entry.from_address(address)).field is not None:
        yield entry.field.decode(), (entry.offset, entry.size)
        address += ctypes.sizeof(_Entry)
