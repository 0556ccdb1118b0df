"""Checks the header of a safetensors file without loading a tensor: 8 bytes of length, that much JSON, then the
tensors' bytes.

The rules are the format's own (github.com/huggingface/safetensors, "Format"), and its readers check them too. Here they
are checked before a file is published or opened, from its start alone, and without an array library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from stages.errors import printable

LENGTH = 8
"""Bytes of the length in front, little-endian."""
LONGEST = 100_000_000
"""Bytes that the JSON may have."""
DIMENSIONS = 64
"""As many as array libraries take."""
METADATA = "__metadata__"
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Type of a tensor's numbers -> bits of each."""


def problem(first: Callable[[int], bytes], size: int) -> str | None:
    """The problem with a file of `size` bytes; None for a correct one. `first(n)` gives its first n bytes."""
    length = LENGTH  # of a file that is too short for one
    if size >= LENGTH:
        length = int.from_bytes(first(LENGTH), "little")
    if length > min(size - LENGTH, LONGEST):
        return f"its safetensors header would have {length} bytes, in a file of {size}"
    try:
        end = _end(_tensors(first(LENGTH + length)[LENGTH:]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"its safetensors header is not one ({type(error).__name__}: {printable(str(error))})"
    left = size - LENGTH - length
    if end != left:
        return f"its safetensors header describes {end} bytes of tensors, and there are {left}"
    return None


def _tensors(header: bytes) -> list[dict[str, Any]]:
    if header[:1] != b"{":
        raise ValueError("it does not begin with a {")
    fields = json.loads(header.decode(), object_pairs_hook=once)
    metadata = fields.pop(METADATA, {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{METADATA} holds more than text")
    return list(fields.values())


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different. Raises ValueError for any other."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name is there twice")
    return fields


def _end(tensors: list[dict[str, Any]]) -> int:
    """The end of the last tensor. Raises ValueError unless each tensor begins at the end of the previous one."""
    end = 0
    for start, stop in sorted(map(_span, tensors)):
        if start != end:
            raise ValueError(f"tensors overlap, or leave a hole, at byte {min(start, end)}")
        end = stop
    return end


def _span(tensor: dict[str, Any]) -> tuple[int, int]:
    """Start and end of a tensor's bytes. Raises ValueError unless their number fits its type and shape."""
    shape, (start, stop) = tensor["shape"], tensor["data_offsets"]
    if len(shape) > DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)):
        raise ValueError("a shape or an offset is no whole number")
    if math.prod(shape) * BITS[tensor["dtype"]] != 8 * (stop - start):
        raise ValueError(f"a tensor of type {tensor['dtype']} and shape {shape} does not have {stop - start} bytes")
    return start, stop
