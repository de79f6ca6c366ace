"""CUDA C source text, and what can be read off it without a compiler: its kernels' parameters.

Both backends take a `Source`. Names and types of the parameters are what the launch checks and the
error messages speak of; the text itself goes to the compiler unedited.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

_BESIDE_PACKAGE = Path(__file__).resolve().parents[2] / "cuda"
CUDA_ROOT = (
    _BESIDE_PACKAGE if _BESIDE_PACKAGE.is_dir() else Path(__file__).resolve().parents[1] / "cuda"
)
"""The kernels' sources: at the top of a checkout, inside an installed package."""
INCLUDE_ROOT = CUDA_ROOT / "include"

C_TYPES = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.int64: "long long",
    torch.int32: "int",
    torch.int16: "short",
    torch.int8: "signed char",
    torch.uint8: "unsigned char",
    torch.bool: "bool",
    torch.float64: "double",
}

TemplateArgument = torch.dtype | bool | int | str


@dataclass(frozen=True, slots=True)
class Source:
    """A translation unit. `name` is what diagnostics call it: a path, or a title for a string."""

    text: str
    name: str

    @classmethod
    def read(cls, path: str | Path) -> Source:
        return cls(Path(path).read_text(), str(path))

    @classmethod
    def of_op(cls, file: str) -> Source:
        """A file of `cuda/`."""
        return cls.read(CUDA_ROOT / file)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a kernel. `c_type` is without const, with template arguments put in where
    they stand alone (`T*` becomes `float*`)."""

    name: str
    c_type: str

    @property
    def is_pointer(self) -> bool:
        return self.c_type.endswith("*")


def instantiation(name: str, arguments: tuple[TemplateArgument, ...]) -> str:
    """`rms_norm`, (torch.bfloat16, 576, True) -> `rms_norm<__nv_bfloat16, 576, true>`."""
    if not arguments:
        return name
    return f"{name}<{', '.join(map(_spelled, arguments))}>"


def parameters(source: Source, expression: str) -> tuple[Parameter, ...]:
    """The parameters of the kernel that `expression` names (`scale<float>`).

    Raises:
        ValueError: the source has no such `__global__` function, or another number of template
            parameters; the message lists the kernels that there are.
    """
    name, _, rest = expression.partition("<")
    name = name.strip()
    given = [part.strip() for part in _split(rest.rstrip().removesuffix(">"))] if rest else []
    text = _without_comments(source.text)
    kernels = {match["name"]: match for match in _KERNEL.finditer(text)}
    if name not in kernels:
        raise ValueError(
            f"{source.name} has no __global__ function {name}; it has {', '.join(kernels) or 'none'}"
        )
    match = kernels[name]
    template = _split(match["template"] or "")
    required = [part for part in template if "=" not in part]
    if not len(required) <= len(given) <= len(template):
        raise ValueError(
            f"{name} has {len(template)} template parameters ({', '.join(template)}), and "
            f"{expression} gives {len(given)}"
        )
    values = {
        part.partition("=")[0].split()[-1]: value
        for part, value in zip(template, given, strict=False)
        if part.split()[0] in ("typename", "class")
    }
    start = match.end()
    return tuple(_parameter(part, values) for part in _split(text[start : _closing(text, start)]))


_KERNEL = re.compile(
    r"(?:template\s*<(?P<template>[^{};]*?)>\s*)?"
    r"(?:extern\s+\"C\"\s+)?(?:static\s+)?__global__\s+"
    r"(?:void\s+)?(?:__launch_bounds__\s*\([^()]*(?:\([^()]*\)[^()]*)*\)\s*)?(?:void\s+)?"
    r"(?P<name>\w+)\s*\("
)


def _parameter(text: str, values: dict[str, str]) -> Parameter:
    text = re.sub(r"\b(const|__restrict__|__grid_constant__)\b", " ", text.partition("=")[0])
    match = re.fullmatch(r"\s*(?P<type>.*?[\s*&>])(?P<name>\w+)\s*", text, re.DOTALL)
    if match is None:
        raise ValueError(f"cannot read the kernel parameter {text.strip()!r}: give it a name")
    c_type = " ".join(match["type"].split()).replace(" *", "*")
    base, stars = c_type.rstrip("*"), c_type[len(c_type.rstrip("*")) :]
    base = values.get(base, base)
    return Parameter(match["name"], _CANONICAL.get(base, base) + stars)


_CANONICAL = {
    "nb::int64": "long long",
    "nb::uint32": "unsigned int",
    "nb::uint64": "unsigned long long",
    "int64_t": "long long",
    "int32_t": "int",
    "uint32_t": "unsigned int",
    "uint64_t": "unsigned long long",
    "unsigned": "unsigned int",
    "long long int": "long long",
    "half": "__half",
    "nv_bfloat16": "__nv_bfloat16",
}


def _spelled(argument: TemplateArgument) -> str:
    if isinstance(argument, bool):
        return "true" if argument else "false"
    if isinstance(argument, torch.dtype):
        return C_TYPES[argument]
    return str(argument)


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "(<[") - (char in ")>]")
        if char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _closing(text: str, start: int) -> int:
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text)


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
