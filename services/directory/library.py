"""The compiled block index by ctypes: the functions of index.c."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p

from services.directory.build import INDEX

NUM_WORKERS = 64


class IndexUnavailable(Exception):
    """The block index could not be compiled or loaded; the message says what to do."""


@functools.cache
def load() -> ctypes.PyDLL:
    """Compiles if need be.  Calls keep the GIL: each is to be short, and it lets other threads read the counts.  Raises
    IndexUnavailable."""
    try:
        library = ctypes.PyDLL(str(INDEX.build()))
    except (RuntimeError, OSError) as error:
        raise IndexUnavailable(str(error)) from error
    library.kvd_open.restype, library.kvd_open.argtypes = c_void_p, [c_uint64, c_uint32]
    library.kvd_close.restype, library.kvd_close.argtypes = None, [c_void_p]
    library.kvd_store.restype = c_size_t
    library.kvd_store.argtypes = [c_void_p, c_int, c_int, c_char_p, c_size_t, c_size_t]
    library.kvd_remove.restype, library.kvd_remove.argtypes = None, [c_void_p, c_int, c_int, c_char_p, c_size_t]
    library.kvd_drop.restype, library.kvd_drop.argtypes = c_size_t, [c_void_p, c_int, c_size_t]
    library.kvd_list.restype = c_size_t
    library.kvd_list.argtypes = [c_void_p, c_int, c_int, c_void_p, c_void_p, c_size_t]
    library.kvd_match.restype = c_size_t
    library.kvd_match.argtypes = [c_void_p, c_uint64, c_char_p, c_size_t, c_void_p]
    library.kvd_num_held.restype, library.kvd_num_held.argtypes = c_uint64, [c_void_p, c_int]
    library.kvd_nbytes.restype, library.kvd_nbytes.argtypes = c_uint64, [c_void_p]
    library.kvd_fault.restype, library.kvd_fault.argtypes = c_char_p, [c_void_p]
    return library
