"""Mutants of a file by the operators of mutmut, and a seeded sample of them."""

import ast
import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import libcst
from mutmut.mutation.file_mutation import create_mutations

from benchmarks.mutation.suites import Suite


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    """One change of one file."""

    group: str
    """The group of modules that it counts for."""
    file: str
    """The changed file, relative to the checkout."""
    number: int
    """Its number among the mutants of the file."""
    source: str
    """The whole file, changed."""
    change: str
    """The changed lines as a diff without context, after the number of the first line."""


def sample(root: Path, suites: Sequence[Suite], count: int, seed: int) -> tuple[list[Mutant], dict[str, int]]:
    """Draw `count` mutants of every group, all equally likely, in turns: a run that is cut short is a sample, too.

    Returns:
        The mutants, and by group how many there are in all.
    """
    drawn: dict[str, list[Mutant]] = {}
    sizes: dict[str, int] = {}
    for group in dict.fromkeys(suite.group for suite in suites):
        files = [suite.file for suite in suites if suite.group == group]
        places = [(file, number) for file in files for number in range(len(_mutations(root / file)[1]))]
        sizes[group] = len(places)
        # S311: a sample, and no secret
        random.Random(f"{seed}/{group}").shuffle(places)  # noqa: S311
        mutants = (_mutant(root, group, file, number) for file, number in places)
        drawn[group] = [mutant for mutant, _ in zip(filter(None, mutants), range(count), strict=False)]
    turns = max(map(len, drawn.values()), default=0)
    return [mutants[turn] for turn in range(turns) for mutants in drawn.values() if turn < len(mutants)], sizes


@cache
def _mutations(path: Path) -> tuple[Any, list[Any]]:
    """Return the file as a tree, and its mutations without those of prose: words of a message are no behaviour."""
    module, mutations, _, _ = create_mutations(str(path), path.read_text(encoding="utf-8"))
    return module, [each for each in mutations if not _is_prose(each.original_node)]


def _is_prose(node: object) -> bool:
    return isinstance(node, libcst.SimpleString) and " " in str(node.value)


def _mutant(root: Path, group: str, file: str, number: int) -> Mutant | None:
    """Return a mutant, or None where the change makes no other program, or none at all."""
    module, mutations = _mutations(root / file)
    mutation = mutations[number]
    source = str(module.deep_replace(mutation.original_node, mutation.mutated_node).code)
    try:
        if ast.dump(ast.parse(source)) == ast.dump(ast.parse(module.code)):
            return None
    except SyntaxError:
        return None
    change = "\n".join(_changed_lines(module.code, source))
    return Mutant(group=group, file=file, number=number, source=source, change=change)


def _changed_lines(before: str, after: str) -> Iterator[str]:
    old, new = before.splitlines(), after.splitlines()
    for kind, first, last, start, end in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
        if kind != "equal":
            yield f"line {first + 1}"
            yield from (f"- {line.strip()}" for line in old[first:last])
            yield from (f"+ {line.strip()}" for line in new[start:end])
