"""What strangers may send, more and less like what they should."""

from __future__ import annotations

import json
import struct
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

INTEGERS = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63)]),
)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["", "\0", "../../x", "a" * 5000, "\ud83d\ude00", "\u202e"]))
SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, TEXTS)


def values(names: list[str]) -> st.SearchStrategy[Any]:
    """JSON of any shape, whose objects like to have fields of these names."""
    keys = st.one_of(st.sampled_from(names), st.text(max_size=5))
    return st.recursive(
        SCALARS,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=5)),
        max_leaves=12,
    )


def objects(template: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """``template`` with some fields changed for anything, some left out and some added."""
    anything = values([*template])
    fields = {name: st.one_of(st.just(value), st.just(value), anything) for name, value in template.items()}
    return st.builds(
        lambda some, more: some | more,
        st.fixed_dictionaries({}, optional=fields),
        st.dictionaries(st.text(max_size=5), anything, max_size=1),
    )


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def damaged(whole: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Whole, cut, or with some bytes replaced by others; or anything."""

    def cut(data: bytes, at: int) -> bytes:
        return data[: at % (len(data) + 1)]

    def patched(data: bytes, at: int, patch: bytes) -> bytes:
        at %= len(data) + 1
        return data[:at] + patch + data[at + len(patch) :]

    places = st.integers(0, 1 << 16)
    patches = st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from([bytes(8), b"\xff" * 8, struct.pack("<Q", 1 << 62), struct.pack("<I", 1 << 31)]),
    )
    return st.one_of(
        whole,
        st.builds(cut, whole, places),
        st.builds(patched, whole, places, patches),
        st.builds(patched, st.builds(patched, whole, places, patches), places, patches),
        st.binary(max_size=300),
    )


def messages(kind: type[Message], depth: int = 3) -> st.SearchStrategy[Message]:
    """Messages with any fields set to anything that their types allow."""
    fields = {
        field.name: _of_field(field, depth) for field in kind.DESCRIPTOR.fields if depth or not field.message_type
    }

    def build(chosen: dict[str, Any]) -> Message:
        message = kind()
        for name, value in chosen.items():
            field = kind.DESCRIPTOR.fields_by_name[name]
            if isinstance(value, list):
                getattr(message, name).extend(value)
            elif isinstance(value, dict):
                target = getattr(message, name)
                for key, item in value.items():
                    if isinstance(item, Message):
                        target[key].CopyFrom(item)
                    else:
                        target[key] = item
            elif field.message_type:
                getattr(message, name).CopyFrom(value)
            else:
                setattr(message, name, value)
        return message

    return st.fixed_dictionaries({}, optional=fields).map(build)


def _of_field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    message = field.message_type
    if message and message.GetOptions().map_entry:
        keys, items = (_of_type(message.fields_by_name[name], depth) for name in ("key", "value"))
        return st.dictionaries(keys, items, max_size=2)
    one = _of_type(field, depth)
    return st.lists(one, max_size=3) if field.is_repeated else one


def _of_type(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            return messages(field.message_type._concrete_class, depth - 1)
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return st.binary(max_size=40)
        case FieldDescriptor.CPPTYPE_STRING:
            return st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
        case FieldDescriptor.CPPTYPE_ENUM:
            return st.integers(0, 9)
        case FieldDescriptor.CPPTYPE_FLOAT:
            return st.floats(width=32)
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return FLOATS
    bits = 64 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
    signed = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return st.one_of(st.integers(0, 70), st.integers(low, high)).map(lambda value: min(max(value, low), high))
