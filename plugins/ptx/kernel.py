"""A kernel ready to run: its PTX translated into Python functions, and launches of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from fna.errors import FnaError, InvalidArgumentError
from fna.plugins.ptx.accesses import Listing
from fna.plugins.ptx.group import Group, Split
from fna.plugins.ptx.memory import GlobalMemory
from fna.plugins.ptx.number_types import REGISTER_WIDTHS
from fna.plugins.ptx.parsing import Program, parse_program
from fna.plugins.ptx.profile import Profile, classify
from fna.plugins.ptx.translate import translate

FINISHED = -1
LANES_AT_ONCE = 8192
"""Lanes of a group: enough for NumPy to be busy with one instruction, few enough for its arrays to stay in the cache."""

_ENDS_BLOCK = ("bra", "ret")
_WRITES_NO_REGISTER = ("st", "cp", "bra", "red.")


class Kernel:
    """One compiled kernel."""

    def __init__(
        self,
        text: str,
        shared_bytes: int,
        name: str | None = None,
        *,
        tensor_cores_truncate: bool = True,
        profile: bool = False,
    ) -> None:
        """Translate.

        Args:
            text: the PTX.
            shared_bytes: dynamic shared memory of a launch.
            name: for messages; the entry point's by default.
            tensor_cores_truncate: sum products as tensor cores do (NVIDIA does not say how; measured by others), else to nearest.
            profile: also measure how memory is accessed.

        Raises:
            UnmodelledInstructionError: names an instruction that the machine does not know.
        """
        self.program = parse_program(text)
        self.name, self.shared_bytes, self.profile = name or self.program.symbol, shared_bytes, profile
        self.truncate = tensor_cores_truncate
        self.listing = Listing(self.name, self.program.instructions)
        self.shared_granule = _smallest_shared_access(self.program)
        self.shared_stride = max(16, -(-shared_bytes // 16) * 16)
        self.blocks = _find_blocks(self.program)
        self.block_classes = [
            Counter(classify(i.operation) for i in self.program.instructions[start:end]) for start, end in self.blocks
        ]
        translation = translate(self.program, self.blocks, tensor_cores_truncate)
        self.widths = [REGISTER_WIDTHS[name.rstrip("0123456789")] for name in translation.registers]
        self.undefined = _never_written(self.program, translation.registers)
        self._functions: list[Callable[[Group], int | Split]] = translation.functions

    def launch(
        self,
        memory: GlobalMemory,
        grid: tuple[int, int, int],
        arguments: Sequence[int | float],
        *,
        only: Sequence[int] | None = None,
    ) -> Profile:
        """Run the grid and return what it issued; faults are in `memory.reports`.

        Args:
            memory: what the addresses among the arguments point into.
            grid: CTAs in x, y and z.
            arguments: addresses and integers as int, fp32 as float; trailing ones that are not given are 0.
            only: linear indices of the CTAs to run, for a profile of some of them.

        Raises:
            InvalidArgumentError: the arguments do not fit the kernel's parameters.
            CheckFailedError: the kernel does what the machine cannot follow, such as a branch that divides a CTA.
        """
        checked = self._check_arguments(arguments)
        memory.begin_launch()
        every = np.arange(grid[0] * grid[1] * grid[2]) if only is None else np.asarray(only)
        profile = Profile(self.profile)
        step = max(1, LANES_AT_ONCE // self.program.threads)
        with np.errstate(all="ignore"):
            for start in range(0, len(every), step):
                self._run(Group(self, memory, every[start : start + step], grid, checked, profile))
        return profile

    def _check_arguments(self, arguments: Sequence[int | float]) -> list[int | float]:
        kinds = self.program.parameters
        if len(arguments) > len(kinds):
            raise InvalidArgumentError(f"{self.name} takes {len(kinds)} arguments, but {len(arguments)} were given")
        padded = [*arguments, *[0] * (len(kinds) - len(arguments))]
        for position, (argument, kind) in enumerate(zip(padded, kinds, strict=True)):
            if isinstance(argument, float) != (kind == "f32"):
                raise InvalidArgumentError(f"argument {position} of {self.name} is {argument!r}, but .{kind} is needed")
        return padded

    def _run(self, group: Group) -> None:
        waiting = [(group, 0)]
        while waiting:
            running, block = waiting.pop()
            while block != FINISHED:
                group.profile.enter_block(block, running.ctas)
                following = self._run_block(running, block)
                if isinstance(following, tuple):
                    taken, block, other = following
                    waiting.append((running.part(~taken), other))
                    running = running.part(taken)
                else:
                    block = following

    def _run_block(self, group: Group, block: int) -> int | Split:
        try:
            return self._functions[block](group)
        except FnaError:
            raise
        except Exception as error:
            start, end = self.blocks[block]
            lines = f"{self.program.instructions[start].line} to {self.program.instructions[end - 1].line}"
            raise RuntimeError(f"{self.name}, PTX lines {lines}: {error}") from error

    def instructions_by_class(self, profile: Profile, ctas: Sequence[int] | None = None) -> Counter[str]:
        """Instructions that a warp of each of the CTAs issues, summed over them."""
        total: Counter[str] = Counter()
        for block, runs in profile.block_runs(ctas).items():
            for name, count in self.block_classes[block].items():
                total[name] += runs * count
        return total

    def instruction_runs(self, profile: Profile, ctas: Sequence[int] | None = None) -> dict[int, int]:
        """Executions of each instruction by a CTA."""
        return {
            instruction: runs
            for block, runs in profile.block_runs(ctas).items()
            for instruction in range(*self.blocks[block])
        }


def _smallest_shared_access(program: Program) -> int:
    widths = [
        int(bits) // 8
        for i in program.instructions
        if ".shared" in i.operation and not i.operation.startswith("ldmatrix")
        for bits in re.findall(r"\.[bfsu](\d+)$", i.operation)
    ]
    return min([*widths, 4])


def _find_blocks(program: Program) -> list[tuple[int, int]]:
    """Basic blocks as ranges of instructions."""
    ends = {i + 1 for i, made in enumerate(program.instructions) if made.operation.startswith(_ENDS_BLOCK)}
    starts = sorted({0, *program.labels.values(), *ends} - {len(program.instructions)})
    return list(pairwise([*starts, len(program.instructions)]))


def _never_written(program: Program, registers: dict[str, int]) -> list[int]:
    written = {
        name
        for made in program.instructions
        if not made.operation.startswith(_WRITES_NO_REGISTER)
        for name in re.findall(r"%[a-z]+\d+", " ".join(made.operands[:1]))
    }
    return [index for name, index in registers.items() if name not in written]
