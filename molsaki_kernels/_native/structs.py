"""The ctypes structs of the C sources."""

from __future__ import annotations

import ctypes

Strides = ctypes.c_int64 * 3
_PLAN = ("batch", "begin", "length", "tokens_used", "tokens", "word_of_token", "step_of_row")
_TASK = ("sequence", "row", "first", "count", "slot")


class Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("sequences", "columns", "longest", "tasks")),
        *((name, ctypes.c_void_p) for name in (*_PLAN, *(f"task_{name}" for name in _TASK))),
    ]


class AttentionCall(ctypes.Structure):
    _fields_ = [
        ("plan", Plan),
        *((name, ctypes.c_int64) for name in (
            "rows", "q_heads", "kv_heads", "head_dim", "steps", "words", "causal", "window", "is_bf16", "per_head",
            "threads",
        )),
        *((f"{name}_strides", Strides) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "word_weight")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "sinks", "out", "lse", "work")),
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (
            "sums", "maps", "dout", "dlse", "dmaps", "delta", "dq", "dk", "dv", "parts", "part_of",
        )),
    ]  # fmt: skip


class MapCall(ctypes.Structure):
    _fields_ = [
        ("plan", Plan),
        *((name, ctypes.c_int64) for name in (
            "q_heads", "kv_heads", "head_dim", "steps", "words",
            "causal", "window", "is_bf16", "per_head", "threads", "chunk_rows", "chunks",
        )),
        *((name, Strides) for name in ("q_strides", "k_strides", "dq_strides", "dk_strides")),
        ("lse_strides", ctypes.c_int64 * 2), ("scale", ctypes.c_double), ("word_weight", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (
            "q", "k", "lse", "sums", "packed", "maps",
            "dmaps", "upstream", "keys", "dk_parts", "dk_tokens", "kept", "dlse", "dq", "dk",
        )),
    ]  # fmt: skip


class LseGradientCall(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batches", "heads", "rows", "head_dim", "threads")),
        *((f"{name}_strides", Strides) for name in ("out", "dout", "folded", "dlse")),
        ("vanished", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("out", "dout", "folded", "dlse")),
    ]
