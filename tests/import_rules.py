"""Which module imports which, read from the sources alone, and the rules of the house that the imports must keep."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "evla_compile"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("arguments", "errors", "json_text", "memory", "scratch", "terminal", "units"),
    ("settings",),
    ("host",),
    ("certificate",),
    ("artifact", "fidelity", "recordings", "tensorrt"),
    ("graph", "runtime"),
    ("families", "passes"),
    ("calibration",),
    ("compiler",),
    ("exporters",),
    ("compiled_policy", "estimate", "torch_backend", "verification"),
    ("demo", "doctor"),
    ("cli",),
)
"""Rooms of the package from the ground up: a module may import its own room and the floors below, no neighbour."""

TORCH_FREE = (
    *FLOORS[0],
    "settings",
    "host",
    "certificate",
    "artifact",
    "fidelity",
    "recordings",
    "tensorrt",
    "runtime",
    "doctor",
)
"""Rooms that run on a robot: what they import when they are imported never leads to `COMPILER_LIBRARIES`."""

COMPILER_LIBRARIES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript")
"""What is missing on a robot."""

DOORS = ("", "__main__")
"""Modules that stand above the floors: the package itself, whose public names are resolved lazily, and `-m`."""


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's target."""

    target: str
    """Dotted name of the module imported, or of a name in it."""
    line: int
    """Line of the statement."""
    lazy: bool
    """Whether it stands in a function, or is there for the type checker alone."""


class Sources:
    """The modules of the package, tests and benchmarks, as dotted names to their source text."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = dict(texts)

    @classmethod
    def of(cls, root: Path) -> "Sources":
        """Read the checkout at `root`; the links to passes and exporters are followed."""
        folders = {PACKAGE: root / PACKAGE, "tests": root / "tests", "benchmarks": root / "benchmarks"}
        folders |= {f"{PACKAGE}.{name}": root / name for name in ("passes", "exporters")}
        return cls(
            {
                _dotted(package, file.relative_to(folder)): file.read_text(encoding="utf-8")
                for package, folder in folders.items()
                for file in sorted(folder.rglob("*.py"))
            }
        )

    def planted(self, module: str, line: str) -> "Sources":
        """Return a copy in which `module`, made if it is not there, ends with one more line."""
        return Sources({**self.texts, module: f"{self.texts.get(module, '')}\n{line}\n"})

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        """What every module imports, in the order of its lines."""
        return {module: sorted(_imports(text), key=lambda i: i.line) for module, text in self.texts.items()}

    def resolve(self, target: str) -> str | None:
        """Return the module of ours that a dotted target names or lies in; None for other people's."""
        while target and target not in self.texts:
            target = target.rpartition(".")[0]
        return target or None

    def inner(self, *, lazy: bool) -> dict[str, dict[str, int]]:
        """Return for each module which of ours it imports and where, with lazy imports or without."""
        return {
            module: {
                found: entry.line
                for entry in entries
                if (lazy or not entry.lazy) and (found := self.resolve(entry.target)) and found != module
            }
            for module, entries in self.imports.items()
        }


def against_the_floors(sources: Sources) -> list[str]:
    """Return imports that lead upwards or to a neighbour, and rooms that stand on no floor."""
    level = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    faults = []
    for module, targets in sources.inner(lazy=True).items():
        room = _room(module)
        if room is None or room in DOORS:
            continue
        if room not in level:
            faults.append(f"{module}: the room {room!r} stands on no floor")
            continue
        for target, line in targets.items():
            other = _room(target)
            if other is None or other in ("", room):
                continue
            if other not in level or level[other] >= level[room]:
                faults.append(f"{module}:{line} imports {target}: {other!r} is not below {room!r}")
    return faults


def with_a_compiler_library(sources: Sources) -> list[str]:
    """Return, with the way that leads there, modules of the robot's rooms whose import needs a compiler's library."""
    inner = sources.inner(lazy=False)
    faults = []
    for module in sources.texts:
        if _room(module) not in TORCH_FREE:
            continue
        ways = {module: [module]}
        for here in _reached(module, inner, ways):
            found = {entry.target.partition(".")[0] for entry in sources.imports[here] if not entry.lazy}
            faults += [f"{' > '.join(ways[here])} > {name}" for name in COMPILER_LIBRARIES if name in found]
    return faults


def between_passes(sources: Sources) -> list[str]:
    """Return imports of a pass by a pass."""
    home = f"{PACKAGE}.passes"
    return [
        f"{module}:{line} imports {target}"
        for module, targets in sources.inner(lazy=True).items()
        if module.startswith(home + ".")
        for target, line in targets.items()
        if target == home or target.startswith(home + ".")
    ]


def of_tests_or_benchmarks(sources: Sources) -> list[str]:
    """Return imports of tests or benchmarks by the package, and of tests by benchmarks."""
    return [
        f"{module}:{entry.line} imports {entry.target}"
        for module, entries in sources.imports.items()
        for entry in entries
        for top in [entry.target.partition(".")[0]]
        if (top in ("tests", "benchmarks") and _room(module) is not None)
        or (top == "tests" and module.startswith("benchmarks"))
    ]


def circles(sources: Sources) -> list[list[str]]:
    """Return groups of modules that need each other to be imported, lazily or not."""
    inner = {m: set(t) for m, t in sources.inner(lazy=True).items() if _room(m) not in (None, *DOORS)}
    reach = {module: set(_reached(module, inner, {module: []})) for module in inner}
    groups = {
        tuple(sorted({module, *(other for other in reach[module] if module in reach.get(other, ()))}))
        for module in inner
        if any(module in reach.get(other, ()) for other in reach[module] - {module})
    }
    return sorted(list(group) for group in groups)


def _reached(
    start: str, inner: Mapping[str, Mapping[str, int] | set[str]], ways: dict[str, list[str]]
) -> Iterator[str]:
    """Yield `start` and every module that it leads to, and note in `ways` how."""
    waiting: list[str] = [start]
    seen = {start}
    while waiting:
        here = waiting.pop()
        yield here
        for following in inner.get(here, ()):
            if following not in seen:
                seen.add(following)
                ways[following] = [*ways[here], following]
                waiting.append(following)


def _room(module: str) -> str | None:
    """Return the room of a module of the package, "" for the package itself; None outside it."""
    first, *rest = module.split(".")
    return (rest[0] if rest else "") if first == PACKAGE else None


def _dotted(package: str, file: Path) -> str:
    parts = [package, *file.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(text: str) -> Iterator[Import]:
    for node, lazy in _statements(ast.parse(text).body, lazy=False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, lazy)


def _statements(body: Sequence[ast.stmt], *, lazy: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """Yield every statement, nested ones too, and whether importing its module passes it by."""
    for statement in body:
        yield statement, lazy
        later = lazy or isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
        later = later or (isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test))
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt):
                yield from _statements([child], lazy=later)
            elif isinstance(child, ast.ExceptHandler | ast.match_case):
                yield from _statements(child.body, lazy=later)
