"""CUDA C source text, and what can be read off it without a compiler: its kernels' parameters.

Both backends take a `Source`. Names and types of the parameters are what the launch checks and the
error messages speak of; the text goes to the compiler as it stands, but for the names of headers. The
reader below knows the declarations of kernels and nothing else of C++; what it can't read it refuses,
with the line.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nbengine.kernels.diagnostics import CompileError, Diagnostic

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
    torch.uint16: "unsigned short",
    torch.uint32: "unsigned int",
    torch.uint64: "unsigned long long",
    torch.bool: "bool",
    torch.float64: "double",
}

POINTEES: dict[str, tuple[torch.dtype, ...]] = {
    **{c_type: (dtype,) for dtype, c_type in C_TYPES.items()},
    "unsigned short": (torch.uint16, torch.int16),
    "unsigned int": (torch.uint32, torch.int32),
    "unsigned long long": (torch.uint64, torch.int64),
    "char": (torch.int8, torch.uint8),
    "float2": (torch.float32,),
    "float4": (torch.float32,),
    "__half2": (torch.float16,),
    "__nv_bfloat162": (torch.bfloat16,),
    "__nv_fp8_e4m3": (torch.float8_e4m3fn,),
    "__nv_fp8_e5m2": (torch.float8_e5m2,),
}
"""What a tensor may hold that is given for a pointer to this. Pointers to anything else (`void`,
structs) take any tensor."""

SCALARS = {
    "bool": "?",
    "char": "b",
    "signed char": "b",
    "unsigned char": "B",
    "short": "h",
    "unsigned short": "H",
    "int": "i",
    "unsigned int": "I",
    "long": "l",
    "unsigned long": "L",
    "long long": "q",
    "unsigned long long": "Q",
    "float": "f",
    "double": "d",
}
"""What may be passed by value, with its format in the module `struct`."""

TemplateArgument = torch.dtype | bool | int | str


@dataclass(frozen=True, slots=True)
class Source:
    """A translation unit, but for NVIDIA's headers. `name` is what diagnostics call it: a path, or a
    title for a string. `folder` is where its own `#include "..."` are looked for first.

    `path` is the file of the same text that debuggers and profilers are to open, where that is not
    what `name` says.

    The headers are read when it is made, as the text is: a kernel of it that is compiled later is
    made of the same, whatever was edited meanwhile.
    """

    text: str
    name: str
    folder: Path | None = None
    path: Path | None = None
    headers: tuple[tuple[Path, str], ...] = field(init=False, repr=False)
    """Path and text of all that it includes, itself or through others; see `included`."""

    def __post_init__(self) -> None:
        headers = included(self.text, *self._folders)
        object.__setattr__(self, "headers", tuple(headers.items()))
        for name, text in self.texts.items():
            before, null, _ = text.partition("\0")
            if null:
                place = name, before.count("\n") + 1, len(before.rpartition("\n")[2].encode()) + 1
                problem = "a null character: to a compiler the text would end here"
                title = f"{self.name} is not all text"
                raise CompileError(title, [Diagnostic(*place, "error", problem)], self.texts)

    @classmethod
    def read(cls, path: str | Path) -> Source:
        return cls(Path(path).read_text(), str(path), Path(path).resolve().parent)

    @classmethod
    def of_op(cls, file: str) -> Source:
        """A file of `cuda/`."""
        return cls.read(CUDA_ROOT / file)

    @property
    def compiled_name(self) -> str:
        """What compilers are told that it is called."""
        return str(self.path or self.name)

    def with_own_name(self, log: str) -> str:
        """What a compiler says, with the source's name as messages have it."""
        return log if self.path is None else log.replace(self.compiled_name, self.name)

    @property
    def texts(self) -> dict[str, str]:
        """Its own and its headers', by the names that diagnostics have for them."""
        return {self.name: self.text, **{str(path): text for path, text in self.headers}}

    def spelled(self, name_of: Callable[[Path], str]) -> tuple[str, dict[Path, str]]:
        """The text, and its headers', with each header included by the name `name_of(path)`: for a
        compiler that is to take these and look for no others."""
        known = dict(self.headers)

        def linked(text: str, *beside: Path) -> str:
            def include(match: re.Match[str]) -> str:
                places = _places(match["name"], *beside, *self._folders)
                path = next((path for path in places if path in known), None)
                return match[0] if path is None else f'{match["before"]}"{name_of(path)}"'

            return _INCLUDE.sub(include, text)

        return linked(self.text), {path: linked(text, path.parent) for path, text in self.headers}

    @property
    def _folders(self) -> tuple[Path, ...]:
        return (INCLUDE_ROOT,) if self.folder is None else (self.folder, INCLUDE_ROOT)


def is_text(given: object) -> bool:
    """Whether it is CUDA C itself, and not a path or a name."""
    return isinstance(given, str) and ("\n" in given or "{" in given)


def included(text: str, *folders: Path) -> dict[Path, str]:
    """The text of every header that `text` includes, itself or through others, as far as they lie in
    these folders or beside what includes them. Which branches of `#if` are taken is not looked at, so
    there may be more than the compiler reads, never fewer, unless a macro spells an include."""
    found: dict[Path, str] = {}
    waiting: list[tuple[str, tuple[Path, ...]]] = [(text, ())]
    while waiting:
        text, beside = waiting.pop()
        for match in _INCLUDE.finditer(text):
            for path in _places(match["name"], *beside, *folders):
                if path not in found and path.is_file():
                    found[path] = path.read_text(errors="replace")
                    waiting.append((found[path], (path.parent,)))
                if path in found:
                    break
    return found


def _places(name: str, *folders: Path) -> Iterator[Path]:
    return (Path(os.path.normpath(folder / name)) for folder in folders)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a kernel. `c_type` is without const, with template arguments put in (`T*`
    becomes `float*`) and in its usual spelling (`nb::int64` becomes `long long`)."""

    name: str
    c_type: str

    @property
    def is_pointer(self) -> bool:
        return self.c_type.endswith("*")

    def __str__(self) -> str:
        return f"{self.c_type} {self.name}"


def instantiation(name: str, arguments: tuple[TemplateArgument, ...]) -> str:
    """`rms_norm`, (torch.bfloat16, 576, True) -> `rms_norm<__nv_bfloat16, 576, true>`."""
    if not arguments:
        return name
    return f"{name}<{', '.join(map(_spelled, arguments))}>"


def parameters(source: Source, expression: str) -> tuple[Parameter, ...]:
    """The parameters of the kernel that `expression` names (`scale<float>`), which may also lie in
    a header that the source includes.

    Raises:
        CompileError: there is no such `__global__` function (the message lists those that there
            are), it has another number of template parameters, a parameter is passed by value and
            is not a number, or there are two of the name with different parameters, and which one is
            compiled is for the preprocessor and the namespaces to say.
    """
    (kernel, *others), given = _found(source, expression)
    meanings = _meanings(source)
    found = kernel.parameters(given, meanings)
    types = [parameter.c_type for parameter in found]
    for other in others:
        if [parameter.c_type for parameter in other.parameters(given, meanings)] != types:
            raise other.error(
                other.at,
                f"{kernel.name} has other parameters at {kernel.file}:{kernel.line_of(kernel.at)}, "
                "and which of the two is compiled can't be told here: give one of them another name",
            )
    return found


def template_arguments(source: Source, expression: str) -> dict[str, str]:
    """What stands for each template parameter of the kernel that `expression` names, by its name
    there: {"T": "float", "kSize": "64"}. Raises `CompileError` as `parameters` does."""
    (kernel, *_), given = _found(source, expression)
    kernel.parameters(given, _meanings(source))
    return kernel.values(given)


def launch_bound(source: Source, expression: str) -> int | None:
    """The most threads of a block, by the kernel's `__launch_bounds__`; None without, or where its
    value is more than arithmetic of template arguments and named numbers."""
    kernels, given = _found(source, expression)
    meanings = _meanings(source)
    found = [kernel.launch_bound(meanings | kernel.values(given)) for kernel in kernels]
    known = [bound for bound in found if bound is not None]
    return max(known) if len(known) == len(found) else None


def declared_at(source: Source, expression: str) -> tuple[str, int | None]:
    """File and line of the kernel that `expression` names: for what a compiler says of it."""
    try:
        (kernel, *_), _ = _found(source, expression)
    except CompileError:
        return source.name, None
    return kernel.file, kernel.line_of(kernel.at)


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A `__global__` function in a text without comments: where its name and parameters are."""

    name: str
    template: tuple[str, ...]
    bounds: str | None
    """What `__launch_bounds__` says."""
    at: int
    parameters_at: int
    text: str
    file: str
    original: str
    """The text with its comments."""

    @property
    def parameters_end(self) -> int:
        return _closing(self.text, self.parameters_at)

    @property
    def is_defined(self) -> bool:
        return not self.text[self.parameters_end + 1 :].lstrip().startswith(";")

    def takes(self, num_arguments: int) -> bool:
        num_required = sum("=" not in part for part in self.template)
        is_variadic = any("..." in part for part in self.template)
        return num_required <= num_arguments and (
            is_variadic or num_arguments <= len(self.template)
        )

    def values(self, given: list[str]) -> dict[str, str]:
        """What stands for each template parameter."""
        values: dict[str, str] = {}
        for index, part in enumerate(self.template):
            name, _, default = (side.strip() for side in part.partition("="))
            value = given[index] if index < len(given) else _put_in(values, default)
            values[name.split()[-1].lstrip(".")] = value
        return values

    def parameters(self, given: list[str], meanings: dict[str, str]) -> tuple[Parameter, ...]:
        if not self.takes(len(given)):
            raise self.error(
                self.at,
                f"{self.name} has {len(self.template)} template parameters "
                f"({', '.join(self.template)}), and {len(given)} are given",
            )
        values = self.values(given)
        text = self.text[self.parameters_at : self.parameters_end]
        return tuple(
            _parameter(part, values, meanings, self)
            for part in _split(text)
            if part.strip() != "void"
        )

    def launch_bound(self, meanings: dict[str, str]) -> int | None:
        text = _split(self.bounds)[0] if self.bounds else ""
        for _ in range(_NESTED):
            text = re.sub(
                r"(?:\w+::)*([A-Za-z_]\w*)", lambda match: f"({meanings.get(match[1])})", text
            )
        if not re.fullmatch(r"[\d\s()+*/-]+", text) or "**" in text:
            return None
        try:
            return int(eval(text.replace("/", "//")))
        except (SyntaxError, TypeError, ZeroDivisionError):
            return None

    def line_of(self, at: int) -> int:
        return self.text.count("\n", 0, at) + 1

    def error(self, at: int, message: str) -> CompileError:
        before = self.original[self.original.rfind("\n", 0, at) + 1 : at]
        column = len(before.encode()) + 1
        return CompileError(
            f"{self.file}: the kernel {self.name} can't be used so",
            [Diagnostic(self.file, self.line_of(at), column, "error", message)],
            {self.file: self.original},
        )


_INCLUDE = re.compile(
    r'^(?P<before>[ \t]*#[ \t]*include[ \t]*)[<"](?P<name>[^">\n]+)[>"]', re.MULTILINE
)
_GLOBAL = re.compile(r"\b__global__\b")
_TEMPLATE = re.compile(r"\btemplate\s*<")
_AFTER_GLOBAL = re.compile(
    r"\s*(?:(?:void|static|inline|__forceinline__|__noinline__)\b"
    r"|(?P<attribute>__\w+__)\s*(?P<bracket>\()?|\[\[.*?\]\])",
    re.DOTALL,
)
_NAME = re.compile(r"\s*(?P<name>\w+)\s*\(")
_QUALIFIERS = re.compile(
    r"\b(?:const|volatile|struct|enum|typename|__restrict__|__restrict|__grid_constant__)\b"
    r"|\[\[.*?\]\]"
)
_STANDARD = re.compile(r"(?:::)?(?:\bcuda::)?\bstd::")
_MEANING = re.compile(
    r"\busing\s+(?P<alias>\w+)\s*=\s*(?P<to>[^;{}]+);"
    r"|\btypedef\s+(?P<type>[^;{}()]+?)\b(?P<typedef>\w+)\s*;"
    r"|\bconstexpr\s+[\w:\s]*?\b(?P<constant>\w+)\s*=\s*(?P<value>[^;{}]+);"
    r"|^[ \t]*#[ \t]*define[ \t]+(?P<macro>\w+)[ \t]+(?P<text>\S.*)$",
    re.MULTILINE,
)
_NESTED = 8
"""How deep a name may stand for another one."""
_CANONICAL = {
    "nb::int64": "long long",
    "nb::uint32": "unsigned int",
    "nb::uint64": "unsigned long long",
    "int8_t": "signed char",
    "int16_t": "short",
    "int32_t": "int",
    "int64_t": "long long",
    "uint8_t": "unsigned char",
    "uint16_t": "unsigned short",
    "uint32_t": "unsigned int",
    "uint64_t": "unsigned long long",
    "size_t": "unsigned long long",
    "ptrdiff_t": "long long",
    "unsigned": "unsigned int",
    "signed": "int",
    "short int": "short",
    "unsigned short int": "unsigned short",
    "long int": "long",
    "unsigned long int": "unsigned long",
    "long long int": "long long",
    "long long unsigned int": "unsigned long long",
    "unsigned long long int": "unsigned long long",
    "half": "__half",
    "half2": "__half2",
    "nv_bfloat16": "__nv_bfloat16",
    "nv_bfloat162": "__nv_bfloat162",
}
_TYPE_WORDS = frozenset((*SCALARS, "long", "signed", "unsigned", "void"))


def _found(source: Source, expression: str) -> tuple[list[_Kernel], list[str]]:
    """The kernels that `expression` may name, and its template arguments. Where some are defined,
    those that are only declared are the same, or none of the kernel's."""
    name, bracket, rest = expression.partition("<")
    name = name.strip().rpartition("::")[2]
    given = _split(rest.rstrip().removesuffix(">")) if bracket else []
    kernels = [kernel for file, text in source.texts.items() for kernel in _kernels(file, text)]
    named = [kernel for kernel in kernels if kernel.name == name]
    if not named:
        there = ", ".join(dict.fromkeys(kernel.name for kernel in kernels)) or "none"
        raise CompileError(
            f"{source.name} has no __global__ function {name}; it has: {there}",
            [Diagnostic(source.name, None, None, "error", f"no __global__ function {name}")],
            {source.name: source.text},
        )
    defined = [kernel for kernel in named if kernel.is_defined] or named
    return [kernel for kernel in defined if kernel.takes(len(given))] or defined, given


def _kernels(file: str, original: str) -> Iterator[_Kernel]:
    """Every kernel that the text declares; specialisations and instantiations are left out, as
    they have the parameters of their template."""
    if "__global__" not in original:
        return
    text = without_comments(original)
    for match in _GLOBAL.finditer(text):
        at, bounds = match.end(), None
        while (after := _AFTER_GLOBAL.match(text, at)) is not None:
            at = after.end()
            if after["bracket"]:
                end = _closing(text, at)
                bounds = text[at:end] if after["attribute"] == "__launch_bounds__" else bounds
                at = end + 1
        name = _NAME.match(text, at)
        if name is None:
            continue
        head = text[max(text.rfind(end, 0, match.start()) for end in ";}{") + 1 : match.start()]
        template = _TEMPLATE.search(head)
        parts: tuple[str, ...] = ()
        if template is not None:
            parts = tuple(_split(head[template.end() : _closing(head, template.end(), "<>")]))
        yield _Kernel(
            name["name"], parts, bounds, name.start("name"), name.end(), text, file, original
        )


@functools.lru_cache(maxsize=64)
def _meanings(source: Source) -> dict[str, str]:
    """What names stand for, by `using`, `typedef`, `constexpr` and `#define`. A name with two
    meanings is left out."""
    found: dict[str, str] = {}
    doubtful = set()
    for text in map(without_comments, source.texts.values()):
        for match in _MEANING.finditer(text):
            name = next(filter(None, match.group("alias", "typedef", "constant", "macro")))
            meaning = next(filter(None, match.group("to", "type", "value", "text"))).strip()
            if found.setdefault(name, meaning) != meaning:
                doubtful.add(name)
    return {name: meaning for name, meaning in found.items() if name not in doubtful}


def _parameter(
    text: str, values: dict[str, str], meanings: dict[str, str], kernel: _Kernel
) -> Parameter:
    at = kernel.text.index(text, kernel.parameters_at)
    declared = " ".join(_QUALIFIERS.sub(" ", text.partition("=")[0]).split())
    declared = re.sub(r"(\w+)\s*\[\s*\]$", r"* \1", declared)
    match = re.fullmatch(r"(?P<type>[^()]*?[\s*&>])\s*(?P<name>\w+)", declared)
    if match is None or match["name"] in _TYPE_WORDS:
        raise kernel.error(at, f"cannot read the parameter {text!r}: write a type and a name")
    parameter = Parameter(match["name"], _canonical(_put_in(values, match["type"]), meanings))
    if not parameter.is_pointer and parameter.c_type not in SCALARS:
        raise kernel.error(
            at,
            f"{parameter.name} is a {parameter.c_type} by value; by value a kernel can be given "
            f"{', '.join(SCALARS)}. Pass its numbers one by one, or a pointer to a tensor",
        )
    return parameter


def _put_in(values: dict[str, str], text: str) -> str:
    return re.sub(r"\w+", lambda match: values.get(match[0], match[0]), text)


def _canonical(c_type: str, meanings: dict[str, str]) -> str:
    """The type in its usual spelling, without const and namespaces of the standard."""
    stars = ""
    for _ in range(_NESTED):
        c_type = " ".join(_QUALIFIERS.sub(" ", _STANDARD.sub("", c_type)).split())
        c_type = re.sub(r"\s*\*\s*", "*", c_type)
        base = c_type.rstrip("*")
        stars += c_type[len(base) :]
        base = _CANONICAL.get(base, base)
        name = base.rpartition("::")[2]
        if not name.isidentifier() or name not in meanings:
            break
        c_type = meanings[name]
    return base + stars


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
        depth += (char in "(<[{") - (char in ")>]}")
        if char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _closing(text: str, start: int, brackets: str = "()") -> int:
    """Where the bracket that was opened just before `start` is closed."""
    opened, round_ones = 1, 0
    for at in range(start, len(text)):
        if not round_ones:  # `template <bool b = (n > 4)>`
            opened += (text[at] == brackets[0]) - (text[at] == brackets[1])
        if opened == 0:
            return at
        if brackets != "()":
            round_ones += (text[at] == "(") - (text[at] == ")")
    return len(text)


def without_comments(text: str) -> str:
    """Comments and literals of characters become blanks, so that every position stays where it was."""

    def blank(match: re.Match[str]) -> str:
        if match[0] == '"C"':
            return match[0]
        return re.sub(r"[^\n]", " ", match[0])

    return _BLANKED.sub(blank, text)


_BLANKED = re.compile(
    r"""//[^\n]*|/\*.*?(?:\*/|\Z)|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])'""", re.DOTALL
)
