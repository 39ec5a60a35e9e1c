"""Bytes that go out: JSON and server-sent events."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

# ASCII only: readers that split lines wherever Unicode sees a line's end then cannot tear an event apart.
_encoder = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False)

DONE_EVENT = b"data: [DONE]\n\n"


def encode(content: dict[str, Any] | str) -> bytes:
    return _encoder.encode(content).encode("ascii")


def sse_event(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % encode(content)


def plain(message: Message) -> dict[str, Any]:
    """A message of scalars and messages, and lists of messages, as a dict under the proto's field names.  Integers stay
    integers (protobuf's own JSON makes strings of 64-bit ones); messages and optional fields that are not set are left
    out."""
    content: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            continue
        if isinstance(value, Message):
            content[field.name] = plain(value)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            content[field.name] = [plain(each) for each in value]
        else:
            content[field.name] = value
    return content
