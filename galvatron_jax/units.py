"""Units: base units inside the package (bytes, seconds, FLOP), readable ones where something is printed."""

from __future__ import annotations

import re

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4

_BYTE_UNITS = {
    "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int | float) -> int:
    """Reads a size in bytes: a number of bytes, or text such as ``"20GiB"`` or ``"16 GB"``.

    Raises:
        ValueError: when the text is no number followed by a known unit.

    Example:
        >>> parse_bytes("1.5 GiB")
        1610612736
    """
    if isinstance(text, (int, float)):
        return int(text)
    match = _SIZE.fullmatch(text)
    unit = match and _BYTE_UNITS.get((match[2] or "B").lower())
    if not match or not unit:
        raise ValueError(f"{text!r} is no size in bytes; write for example '20GiB', '512MiB' or '80GB'.")
    return int(float(match[1]) * unit)


def format_bytes(count: float) -> str:
    """Writes a number of bytes with a binary unit.

    Example:
        >>> format_bytes(1610612736)
        '1.50 GiB'
    """
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Writes a duration with the unit that suits it.

    Example:
        >>> format_seconds(0.00123)
        '1.23 ms'
    """
    if abs(seconds) >= 120:
        return f"{seconds / 60:.1f} min"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def format_rate(per_second: float, unit: str) -> str:
    """Writes a rate with a decimal prefix.

    Example:
        >>> format_rate(9.89e14, "FLOP/s")
        '989.0 TFLOP/s'
    """
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(per_second) >= size:
            return f"{per_second / size:.1f} {prefix}{unit}"
    return f"{per_second:.1f} {unit}"
