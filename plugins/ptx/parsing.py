"""PTX text as instructions, labels and parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fna.errors import InputFileError


class UnmodelledInstructionError(NotImplementedError):
    """The machine does not know this instruction."""


@dataclass(frozen=True)
class Guard:
    """The predicate of an instruction; it executes where the predicate is true, or false where `negated`."""

    register: str
    negated: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction: its text without guard and operands split, and where it comes from."""

    text: str
    operation: str
    operands: tuple[str, ...]
    guard: Guard | None
    source: str
    line: int

    @property
    def parts(self) -> list[str]:
        """The operation's name and its modifiers, such as ["ld", "global", "b32"]."""
        return self.operation.split(".")


@dataclass(frozen=True)
class Program:
    """An entry point: parameter types in order, threads of a CTA, instructions, and labels as positions among them."""

    symbol: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)\s*((?:\.\w+[^\n]*\n)*)\{(.*?)\n\}", re.S)
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_LOCATION = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)\s+\d+")
_LABEL = re.compile(r"^(\$?[\w$]+):(.*)")
_GUARD = re.compile(r"@(!?)(%p\d+)\s+(.*)", re.S)
_OPERATION = re.compile(r"([a-z][\w.:]*)\s*(.*)", re.S)


def parse_program(text: str) -> Program:
    """Read the one entry point of a PTX module.

    Raises:
        InputFileError: there is no entry point, or it does not say how many threads a CTA has.
    """
    entry = _ENTRY.search(text)
    if entry is None:
        raise InputFileError("this is not PTX with an entry point; the machine reads what Triton's compiler writes")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry[3])
    if threads is None:
        raise InputFileError(f"{entry[1]} does not say .reqntid, so its number of threads is unknown")
    instructions, labels = _parse_body(entry[4], text[: entry.start(4)].count("\n"), _file_names(text))
    return Program(entry[1], _parameter_types(entry[2]), int(threads[1]), instructions, labels)


def _file_names(text: str) -> dict[str, str]:
    return {match[1]: match[2].rsplit("/", 1)[-1] for match in _FILE.finditer(text)}


def _parameter_types(declaration: str) -> tuple[str, ...]:
    matches = (re.match(r"\s*\.param\s+\.(\w+)", part) for part in declaration.split(","))
    return tuple(match[1] for match in matches if match)


def _parse_body(body: str, first_line: int, files: dict[str, str]) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source, pending = "", ""
    for number, raw in enumerate(body.split("\n"), start=first_line + 1):
        if location := _LOCATION.match(raw):
            source = _source_of(raw, f"{files.get(location[1], location[1])}:{location[2]}")
            continue
        line = raw.split("//")[0].strip()
        if not pending and (label := _LABEL.match(line)):
            labels[label[1]] = len(instructions)
            line = label[2].strip()
        if not line or line.startswith(".") or line in ("{", "}", "{}"):
            continue
        *statements, pending = f"{pending} {line}".split(";")
        pending = pending.strip()
        instructions += [_parse_statement(s.strip(), source, number) for s in statements if s.strip()]
    return tuple(instructions), labels


def _source_of(line: str, otherwise: str) -> str:
    """Triton writes the chain of inlined calls as a comment behind .loc."""
    chain = re.search(r"//\s*(.*)$", line)
    return chain[1].replace(" ]", "").replace("@[ ", "<- ") if chain else otherwise


def _parse_statement(statement: str, source: str, line: int) -> Instruction:
    guarded = _GUARD.match(statement)
    guard = Guard(guarded[2], bool(guarded[1])) if guarded else None
    operation = _OPERATION.match(guarded[3] if guarded else statement)
    if operation is None:
        raise UnmodelledInstructionError(f"line {line}: {statement}")
    return Instruction(statement, operation[1], tuple(split_operands(operation[2])), guard, source, line)


def split_operands(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    return [*operands, current.strip()] if current.strip() else operands
