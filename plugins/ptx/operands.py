"""Operands of PTX instructions as Python expressions over a group `S`, its registers `R` and constants `K`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from fna.plugins.ptx.number_types import NUMBER_TYPES, REGISTER_WIDTHS, f32, f64, u32, u64
from fna.plugins.ptx.parsing import Instruction, UnmodelledInstructionError

SHARED_SYMBOL = "global_smem"
"""Triton's name of a CTA's shared memory, which starts at address 0 here."""

_REGISTER = re.compile(r"%(p|rs|r|rd|f|fd)\d+$")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$")


class Operands:
    """The registers and constants that a kernel's translation has named so far."""

    def __init__(self, truncate: bool) -> None:
        self.truncate = truncate
        self.registers: dict[str, int] = {}
        self.constants: list[Any] = []

    def register(self, name: str) -> int:
        """The index of a register."""
        if not _REGISTER.match(name):
            raise UnmodelledInstructionError(f"{name} is no register")
        return self.registers.setdefault(name, len(self.registers))

    def width(self, name: str) -> np.dtype[Any]:
        """What a register is kept as."""
        return REGISTER_WIDTHS[name.rstrip("0123456789")]

    def bits(self, name: str) -> str:
        """A register as it is kept; also what an assignment to it starts with."""
        return f"R[{self.register(name)}]"

    def constant(self, held: Any) -> str:
        """Anything that the generated code needs and cannot spell."""
        self.constants.append(held)
        return f"K[{len(self.constants) - 1}]"

    def number(self, held: int, kind: str) -> str:
        """A number of a PTX type."""
        return self.constant(NUMBER_TYPES[kind].type(held))

    def typed(self, operand: str, kind: str) -> str:
        """An operand as an array or number of a PTX type; `pred` for predicates."""
        if _REGISTER.match(operand):
            return self._typed_register(operand, kind)
        wanted = NUMBER_TYPES[kind]
        if operand.startswith("%"):
            return f"S.special({operand!r})" + (f".view({_name(wanted)})" if wanted != u32 else "")
        if operand == SHARED_SYMBOL:
            return self.constant(wanted.type(0))
        return self.constant(immediate(operand, wanted))

    def _typed_register(self, operand: str, kind: str) -> str:
        register, kept = self.bits(operand), self.width(operand)
        if kind == "pred":
            return register
        wanted = NUMBER_TYPES[kind]
        if kept.itemsize != wanted.itemsize:
            return f"{register}.astype(u{8 * wanted.itemsize}).view({_name(wanted)})"
        return register if kept == wanted else f"{register}.view({_name(wanted)})"

    def uniform(self, operand: str, kind: str) -> str:
        """An operand as an array of all lanes, whether register or number."""
        if operand.startswith("%"):
            return self.typed(operand, kind)
        wanted = NUMBER_TYPES[kind]
        bits = int(np.array([immediate(operand, wanted)]).view(f"u{wanted.itemsize}")[0])
        return f"S.constant({bits}, u{8 * wanted.itemsize})"

    def address(self, operand: str, *, shared: bool) -> str:
        """An address such as [%r1+16] as an array: uint32 in shared memory, else uint64."""
        match = _ADDRESS.match(operand)
        if match is None:
            raise UnmodelledInstructionError(f"the address {operand}")
        base, offset = match[1], int(match[2] or "0", 0)
        kind = "u32" if shared else "u64"
        if base == SHARED_SYMBOL:
            return f"S.constant({offset}, {kind})"
        register = self.bits(base) + (".astype(u32)" if shared and base.startswith("%rd") else "")
        return register if offset == 0 else f"{register} + {self.constant(_wrapped(offset, NUMBER_TYPES[kind]))}"

    def mask(self, instruction: Instruction) -> str:
        """The guard as a mask of lanes, or None."""
        guard = instruction.guard
        return "None" if guard is None else ("~" if guard.negated else "") + self.bits(guard.register)

    def indices(self, operand: str) -> list[int]:
        """The indices of a register or of a vector of them."""
        return [self.register(name) for name in elements(operand)]


def elements(operand: str) -> list[str]:
    """The elements of a vector such as {%r1, %r2}; a lone operand is its own."""
    return [part.strip() for part in operand.strip("{} ").split(",")] if operand.startswith("{") else [operand]


def immediate(text: str, kind: np.dtype[Any]) -> Any:
    """A number as PTX writes it: 0f and 0d with the bits of a float, else an integer whose bits are taken."""
    if text.startswith("0f"):
        bits = int(text[2:], 16)
        return np.array([bits], u32).view(f32)[0] if kind == f32 else kind.type(bits)
    if text.startswith("0d"):
        return np.array([int(text[2:], 16)], u64).view(f64)[0]
    return _wrapped(int(text, 0), kind)


def _wrapped(number: int, kind: np.dtype[Any]) -> Any:
    bits = number & ((1 << 8 * kind.itemsize) - 1)
    return np.array([bits], f"u{kind.itemsize}").view(kind)[0]


def _name(kind: np.dtype[Any]) -> str:
    """The dtype's name in the generated code."""
    return f"{ {'u': 'u', 'i': 's', 'f': 'f'}[kind.kind] }{8 * kind.itemsize}"


def stored_as(operands: Operands, register: str) -> str:
    """What views an expression as the register keeps it."""
    return f".view({_name(operands.width(register))})"
