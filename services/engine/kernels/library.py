"""The compiled kernels by ctypes: the structs of step.h and the functions of steps.c."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_long, c_void_p

from services.engine.kernels.build import build


class KernelsUnavailable(Exception):
    """The kernels could not be compiled or loaded; the message says what to do."""


class MatrixStruct(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("values", "scales")),
        *((name, c_int64) for name in ("num_rows", "num_columns", "format")),
    )


class LayerStruct(ctypes.Structure):
    _fields_ = (
        *((name, MatrixStruct) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "qkv_bias")),
    )


class ModelStruct(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("format", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim",
                                       "intermediate_size", "vocab_size", "window")),
        ("norm_eps", c_float),
        ("frequencies", c_void_p),
        ("norm", c_void_p),
        ("embedding", MatrixStruct),
        ("head", MatrixStruct),
        ("layers", ctypes.POINTER(LayerStruct)),
    )  # fmt: skip


class BatchStruct(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_sequences", "num_sampled")),
        *((name, c_void_p) for name in ("token_ids", "positions", "slots", "qo_indptr", "kv_indptr", "kv_indices",
                                        "sampled", "arena")),
        *((name, c_int64) for name in ("block_size", "kv_half")),
        *((name, c_void_p) for name in ("sampling", "drawn", "top", "top_logprobs")),
        ("top_stride", c_int64),
        ("logits", c_void_p),
        *((name, c_int64) for name in ("began_ns", "ended_ns", "failed")),
    )  # fmt: skip


@functools.cache
def load() -> ctypes.CDLL:
    """Compiles if need be.  Raises KernelsUnavailable."""
    try:
        library = ctypes.CDLL(str(build()))
    except (RuntimeError, OSError) as error:
        raise KernelsUnavailable(str(error)) from error
    library.kvf_instruction_set.restype, library.kvf_instruction_set.argtypes = c_char_p, [c_int]
    library.kvf_open.restype, library.kvf_open.argtypes = c_void_p, [c_char_p, c_int]
    library.kvf_close.restype, library.kvf_close.argtypes = None, [c_void_p]
    library.kvf_start.restype = c_int
    library.kvf_start.argtypes = [c_void_p, ctypes.POINTER(ModelStruct), ctypes.POINTER(BatchStruct)]
    for wait in (library.kvf_wait_nearly, library.kvf_wait):
        wait.restype, wait.argtypes = None, [c_void_p, c_int]
    library.kvf_draw_row.restype = c_int
    library.kvf_draw_row.argtypes = [c_char_p, c_void_p, c_long, *[c_void_p] * 4]
    library.kvf_count_steps.restype, library.kvf_count_steps.argtypes = None, [c_void_p, c_long, c_void_p]
    library.kvf_measure_peaks.restype = c_int
    library.kvf_measure_peaks.argtypes = [c_char_p, c_int, c_int, c_long, c_double, *[ctypes.POINTER(c_double)] * 2]
    return library


def instruction_sets() -> list[str]:
    """Those that this processor has, the fastest first; the last one is "portable"."""
    library = load()
    names: list[str] = []
    while name := library.kvf_instruction_set(len(names)):
        names.append(name.decode())
    return names
