"""Changes that keep an input's outer form, so that what lies behind the parser is reached."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from tests.fuzz.target import Mutate

EXTREMES = (
    -1,
    0,
    1,
    2,
    16,
    255,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    10**30,
    -(2**63),
)
_SCALARS: tuple[Any, ...] = (
    None, True, False, "", "x", "\0", "a" * 3000, "../x", "\ud83d\ude00", "\u202e", [], {}, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), *EXTREMES,
)  # fmt: skip


def json_values(data: bytes, random: Random) -> bytes | None:
    """One value somewhere in the tree becomes another, goes, or is doubled."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return None
    for _ in range(random.choice((1, 1, 2, 3))):
        parent, key = random.choice(list(_places(root)))
        match random.randrange(6):
            case 0 if parent is not root:
                del parent[key]
            case 1:
                parent[key] = [parent[key]] * random.choice((1, 2, 40))
            case 2:
                donor, from_key = random.choice(list(_places(root)))
                parent[key] = json.loads(json.dumps(donor[from_key]))  # a copy: no value holds itself
            case 3 if isinstance(parent, dict):
                parent[random.choice(("", "x", "\0", *parent))] = parent.pop(key)
            case 4 if isinstance(parent[key], str):
                at = random.randint(0, len(parent[key]))
                parent[key] = parent[key][:at] + random.choice(("\0", "{{", "<|im_end|>", "é", '"')) + parent[key][at:]
            case _:
                parent[key] = random.choice(_SCALARS)
    return json.dumps(root[0]).encode()


def _places(value: Any) -> Sequence[tuple[Any, Any]]:
    found = []
    waiting = [value]
    while waiting and len(found) < 500:
        parent = waiting.pop()
        for key, item in enumerate(parent) if isinstance(parent, list) else parent.items():
            found.append((parent, key))
            if isinstance(item, list | dict):
                waiting.append(item)
    return found


def json_lines(data: bytes, random: Random) -> bytes | None:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    changed = json_values(lines[at], random)
    if changed is None:
        return None
    lines[at] = changed
    return b"\n".join(lines)


def prefixed(inner: Mutate) -> Mutate:
    """Safetensors: eight bytes of length, a header, the rest."""

    def mutate(data: bytes, random: Random) -> bytes | None:
        if len(data) < 8:
            return None
        (length,) = struct.unpack_from("<Q", data)
        header = inner(data[8 : 8 + length], random)
        return None if header is None else struct.pack("<Q", len(header)) + header + data[8 + length :]

    return mutate


def body_of_http(data: bytes, random: Random) -> bytes | None:
    """The body of the first request, and its stated length; the head is libFuzzer's."""
    head, separator, body = data.partition(b"\r\n\r\n")
    changed = json_values(body, random)
    if not separator or changed is None:
        return None
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length:")]
    return b"\r\n".join([*lines, b"content-length: %d" % len(changed), b"", changed])


def message(kind: type[Message]) -> Mutate:
    def mutate(data: bytes, random: Random) -> bytes | None:
        try:
            value = kind.FromString(data)
        except DecodeError:
            return None
        for _ in range(random.choice((1, 1, 2, 3))):
            _change(value, random)
        return value.SerializeToString()

    return mutate


def _change(value: Message, random: Random) -> None:
    while True:  # down to some message
        inner = [
            item
            for field, found in value.ListFields()
            if field.message_type and not field.message_type.GetOptions().map_entry
            for item in (found if field.is_repeated else (found,))
        ]
        if not inner or random.random() < 0.5:
            break
        value = random.choice(inner)
    if not value.DESCRIPTOR.fields:
        return
    field = random.choice(value.DESCRIPTOR.fields)
    held: Any = getattr(value, field.name)
    if field.message_type and field.message_type.GetOptions().map_entry:
        if held and random.random() < 0.5:
            held.clear()
        elif field.message_type.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING:
            held[_scalar(field.message_type.fields_by_name["key"], random)] = random.choice(("", "x", "\0", "a" * 300))
    elif field.is_repeated:
        match random.randrange(4):
            case 0:
                del held[:]
            case 1 if held:
                del held[random.randrange(len(held))]
            case 2 if held:
                held.append(random.choice(held))
            case _:
                held.add() if field.message_type else held.append(_scalar(field, random))
    elif random.random() < 0.2:
        value.ClearField(field.name)
    elif field.message_type:
        held.SetInParent()
    else:
        setattr(value, field.name, _scalar(field, random))


def _scalar(field: FieldDescriptor, random: Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return random.randbytes(random.choice((0, 1, 15, 16, 17, 32, 160)))
        case FieldDescriptor.CPPTYPE_STRING:
            return random.choice(("", "x", "decode-0", "\0", "a" * 300, "é\u202e", "127.0.0.1:1"))
        case FieldDescriptor.CPPTYPE_ENUM:
            return random.randrange(-1, 10)
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return random.choice((0.0, -1.0, 0.5, 1e30, 1e-30, float("nan"), float("inf")))
    bits = 64 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64) else 32
    signed = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return min(max(random.choice((*EXTREMES, random.randrange(70))), low), high)


MAX_FRAMES = 24


def framed(frames: Sequence[tuple[int, bytes]]) -> bytes:
    """Several messages of some kinds in one input."""
    return b"".join(struct.pack("<BH", kind, len(data)) + data for kind, data in frames[:MAX_FRAMES])


def frames_of(data: bytes) -> list[tuple[int, bytes]]:
    """Of any bytes: the last frame may be short of its length."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while at + 3 <= len(data) and len(found) < MAX_FRAMES:
        kind, length = struct.unpack_from("<BH", data, at)
        found.append((kind, data[at + 3 : at + 3 + length]))
        at += 3 + length
    return found


def frames(*kinds: type[Message]) -> Callable[[bytes, Random], bytes | None]:
    """``kinds`` in the order of their numbers."""
    mutators = [message(kind) for kind in kinds]

    def mutate(data: bytes, random: Random) -> bytes | None:
        found = frames_of(data)
        if not found:
            return None
        at = random.randrange(len(found))
        match random.randrange(5):
            case 0:
                del found[at]
            case 1:
                found.insert(random.randint(0, len(found)), found[at])
            case 2:
                other = random.randrange(len(found))
                found[at], found[other] = found[other], found[at]
            case _:
                kind, data = found[at]
                changed = mutators[kind % len(kinds)](data, random)
                if changed is None:
                    return None
                found[at] = kind, changed[:65535]
        return framed(found)

    return mutate
