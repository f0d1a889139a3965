"""The header of a safetensors file: names, dtypes and shapes, without a tensor being read.

8 bytes, little endian: the header's length; the header, JSON; the tensors. A header that claims to be long is not
read: what a file says about itself costs no more memory than the file has bytes, and no more than ``LONGEST``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from sparsec.errors import ArtifactError

LONGEST = 100 << 20  # bytes, the bound of the safetensors library
MOST = 1_000_000  # tensors
SIZES = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip  # bits


@dataclass(frozen=True)
class Entry:
    """A tensor as the header has it."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors by name.

    Raises:
        ArtifactError: the file is none, or its header does not fit its length.
    """
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        said = " ".join(str(error).split())[:160]
        raise ArtifactError(f"{path} is damaged ({said}): copy or compile it again") from None


def _read(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header claims {length} bytes, the file has {size}")
        if length > LONGEST:
            raise ValueError(f"its header of {length} bytes is longer than {LONGEST}")
        header = json.loads(file.read(length).decode("utf-8"))
    header.pop("__metadata__", None)
    if len(header) > MOST:
        raise ValueError(f"it names {len(header)} tensors, more than {MOST}")
    found, end = {}, 0
    for name, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = spec["data_offsets"]
        shape = tuple(spec["shape"])
        if not all(type(n) is int and n >= 0 for n in (first, last, *shape)):
            raise ValueError(f"{name[:80]!r} has no sane shape and place")
        if first != end or (last - first) * 8 != math.prod(shape) * SIZES[spec["dtype"]]:
            raise ValueError(f"{name[:80]!r} has another size than its shape says")
        found[name], end = Entry(spec["dtype"], shape), last
    if 8 + length + end != size:
        raise ValueError(f"its tensors end at {8 + length + end}, the file at {size}")
    return found
