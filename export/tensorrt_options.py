"""How engines are built: sizes, flags of the builder, and the words of ``--trt-option NAME=VALUE``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsec.errors import UsageError

RTX_CAPABILITIES = (80, 86, 89, 120)
RTX_REFUSES = {  # by option of the builder, why
    "timing_cache": "it measures no kernels while it builds",
    "refit": "it needs a GPU for that while it builds",
    "strip": "it needs a GPU for that while it builds",
    "version_compatible": "its engines are bound to one release",
    "hardware_compatible": "capabilities say which GPUs its engines are for",
}


@dataclass(frozen=True)
class Profile:
    """Sizes that an engine takes, (least, usual, most): sequences, and rows of a prompt's call."""

    batch: tuple[int, int, int] = (1, 1, 4)
    rows: tuple[int, int, int] = (1, 256, 512)

    def within(self, slots: int) -> Profile:
        """The same with no call of more rows than a sequence can hold, which TensorRT refuses."""
        least, usual, most = (min(size, slots) for size in self.rows)
        return Profile(self.batch, (least, usual, most))


@dataclass(frozen=True)
class Options:
    """Of the builder for data-centre GPUs.

    Args:
        timing_cache: a file of measured kernels, read where it is there and written anew.
        refit: weights can be exchanged in a built engine. strip: they are left out of the file, to be put in later.
        version_compatible: later minor releases load it. hardware_compatible: GPUs of 8.0 and newer load it.
    """

    timing_cache: Path | None = None
    refit: bool = False
    strip: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False

    @property
    def asked(self) -> list[str]:
        """Names of what differs from the defaults."""
        return [each.name for each in fields(self) if getattr(self, each.name)]

    def check(self, flavour: str) -> None:
        """A flavour builds so.

        Raises:
            UsageError: it does not, with the reason.
        """
        if flavour == "rtx" and (asked := self.asked):
            raise UsageError(
                f"TensorRT-RTX has no {_word(asked[0])}: {RTX_REFUSES[asked[0]]}. Leave it, or use --trt tensorrt"
            )

    def apply(self, trt: ModuleType, config: Any) -> Any:
        """Set a builder's config; the timing cache, or None."""
        flags = {"refit": "REFIT", "strip": "STRIP_PLAN", "version_compatible": "VERSION_COMPATIBLE"}
        for name in self.asked:
            if name in flags:
                config.set_flag(getattr(trt.BuilderFlag, flags[name]))
        if self.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if self.timing_cache is None:
            return None
        known = self.timing_cache.read_bytes() if self.timing_cache.is_file() else b""
        times = config.create_timing_cache(known)
        config.set_timing_cache(times, False)
        return times


@dataclass(frozen=True)
class Build:
    """All that ``--trt-option`` can say; None: as the flavour does by default."""

    options: Options = Options()
    profile: Profile | None = None
    capabilities: tuple[int, ...] | None = None


FLAGS = ("refit", "strip", "version-compatible", "hardware-compatible")
SIZES = tuple(each.name for each in fields(Profile))
NAMES = (*FLAGS, "timing-cache", *SIZES, "capabilities")


def parse(texts: Sequence[str]) -> Build:
    """What ``NAME=VALUE``, one after the other, ask for; a flag may stand without its value.

    Raises:
        UsageError: naming the first one that is unknown, given twice, or of a wrong value.
    """
    given: dict[str, Any] = {}
    for text in texts:
        name, there, value = text.partition("=")
        if name not in NAMES:
            raise UsageError(f"--trt-option {text}: there is no {name!r}. Known: {', '.join(NAMES)}")
        if name in given:
            raise UsageError(f"--trt-option {name} stands twice: give it once")
        given[name] = _value(name, value if there else None)
    sizes = {name: given.pop(name) for name in SIZES if name in given}
    capabilities = given.pop("capabilities", None)
    options = Options(**{name.replace("-", "_"): value for name, value in given.items()})
    return Build(options, Profile(**sizes) if sizes else None, capabilities)


def _value(name: str, text: str | None) -> Any:
    if name in FLAGS:
        if text not in (None, "true", "false"):
            raise UsageError(f"--trt-option {name}={text}: it is true or false")
        return text != "false"
    if not text:
        raise UsageError(f"--trt-option {name} wants a value: {name}={_EXAMPLES[name]}")
    if name == "timing-cache":
        path = Path(text)
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"--trt-option {name}={text}: name a file in a folder that is there")
        return path
    numbers = tuple(int(part) for part in text.split(",")) if re.fullmatch(r"\d+(,\d+)*", text) else ()
    if name == "capabilities":
        if not numbers or len(set(numbers)) < len(numbers):
            raise UsageError(f"--trt-option {name}={text}: compute capabilities, once each, as {_EXAMPLES[name]}")
        return numbers
    if len(numbers) != 3 or list(numbers) != sorted(numbers) or not numbers[0]:
        raise UsageError(f"--trt-option {name}={text}: least, usual and most, ascending, as {_EXAMPLES[name]}")
    return numbers


_EXAMPLES = {
    "timing-cache": "times.bin",
    "capabilities": ",".join(map(str, RTX_CAPABILITIES)),
    **{each.name: ",".join(map(str, each.default)) for each in fields(Profile)},  # type: ignore[arg-type]
}


def _word(name: str) -> str:
    return name.replace("_", "-")
