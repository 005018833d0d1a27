"""What goes between the grader and the process that runs a learner's code: JSON and safetensors.

Nothing is unpickled: whatever that process sends, reading it can give a wrong value or an error,
and nothing else.
"""

import json
import re
import socket
import struct
from typing import Any

import torch
from safetensors.torch import load, save

from attnlab.lab.exercises.framework import is_plain, show

LIMIT = 8 * 2**20  # bytes of one message; the exercises' own need a thirtieth of it
MAX_ITEMS = 10_000
MAX_TEXT = 4_000
MAX_DEPTH = 20
SIZES = struct.Struct("!II")
DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip


class BadMessage(Exception):
    """What came is no message of this form."""


def send(connection: socket.socket, value: Any) -> None:
    """Send tensors, numbers, text, None, and lists, tuples and dictionaries of them.

    Anything else arrives as an object whose type has the same name.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, tensors)).encode()
    data = save(tensors)
    connection.sendall(SIZES.pack(len(text), len(data)) + text + data)


def receive(connection: socket.socket, limit: int = LIMIT) -> Any:
    """The next value. Raises BadMessage, EOFError when the other side is gone, or TimeoutError."""
    text_size, data_size = SIZES.unpack(read_bytes(connection, SIZES.size))
    if text_size + data_size > limit:
        raise BadMessage(f"{text_size + data_size:,} bytes came back, more than {limit:,}")
    text, data = read_bytes(connection, text_size), read_bytes(connection, data_size)
    try:
        return decode(json.loads(text), load(data))
    except Exception as error:
        raise BadMessage(f"what came back cannot be read ({type(error).__name__})") from error


def read_bytes(connection: socket.socket, size: int) -> bytes:
    """So many bytes. Raises EOFError when the other side is gone, or TimeoutError."""
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 2**20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def encode(value: Any, tensors: dict[str, torch.Tensor], depth: int = 0) -> Any:
    """A value as JSON can hold it; its tensors go into `tensors`, under the names it gives."""
    kind = type(value)
    if value is None or kind in (bool, float):
        return value
    if kind is int:
        return value if abs(value) < 2**63 else {"other": "very large int"}
    if kind is str:
        return value[:MAX_TEXT]
    if isinstance(value, torch.Tensor):
        if not is_plain(value) or value.dtype not in DTYPES:
            return {"other": show(value)}
        if value.numel() * value.element_size() > LIMIT // 2:
            return {"other": f"tensor of {value.numel():,} entries"}
        tensors[name := str(len(tensors))] = value.detach().clone().contiguous()
        return {"tensor": name}
    if kind in (list, tuple, dict):
        if len(value) > MAX_ITEMS or depth > MAX_DEPTH or len(tensors) > MAX_ITEMS:
            return {"other": f"very long {kind.__name__}"}
        if kind is dict:
            return {"dict": {str(k): encode(v, tensors, depth + 1) for k, v in value.items()}}
        return {kind.__name__: [encode(item, tensors, depth + 1) for item in value]}
    return {"other": kind.__name__[:100]}


def decode(coded: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value that `encode` was given. Raises one error or another on anything else."""
    if not isinstance(coded, dict):
        if coded is not None and type(coded) not in (bool, int, float, str):
            raise ValueError("a bare list")
        return coded
    ((kind, content),) = coded.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: decode(part, tensors) for name, part in content.items()}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](decode(part, tensors) for part in content)
    if kind == "other" and (name := re.sub(r"[^\w ,.-]", "", str(content))[:100]):
        return type(name, (), {})()
    raise ValueError(f"kind {kind!r}")
