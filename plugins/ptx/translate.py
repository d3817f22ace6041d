"""A kernel's basic blocks as Python functions: control, memory and matrix instructions. Arithmetic is in `translate_arithmetic.py`.

A function takes a group of CTAs and returns the block that follows, FINISHED (-1), or a split.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fna.plugins.ptx import number_types, numerics
from fna.plugins.ptx.number_types import NUMBER_TYPES
from fna.plugins.ptx.operands import Operands, elements
from fna.plugins.ptx.parsing import Instruction, Program, UnmodelledInstructionError
from fna.plugins.ptx.translate_arithmetic import ARITHMETIC


@dataclass(frozen=True)
class Translation:
    """A function for each basic block, and the index of every register by name."""

    functions: list[Callable[[Any], Any]]
    registers: dict[str, int]


def translate(program: Program, blocks: list[tuple[int, int]], truncate: bool) -> Translation:
    """Translate every block; `truncate`: sums of matrix products are cut as tensor cores cut them.

    Raises:
        UnmodelledInstructionError: names the instruction and its line.
    """
    operands = Operands(truncate)
    block_at = {start: index for index, (start, _) in enumerate(blocks)}
    targets = {label: block_at[position] for label, position in program.labels.items() if position in block_at}
    code: list[str] = []
    for index, (start, end) in enumerate(blocks):
        code.append(f"def block{index}(S):\n R = S.registers")
        for position in range(start, end):
            lines = _emit(operands, program.instructions[position], position, index, targets)
            code += [f" {line}" for line in lines]
        code.append(f" return {index + 1}")
    namespace: dict[str, Any] = {**vars(number_types), **vars(numerics), "K": operands.constants}
    exec(compile("\n".join(code), program.symbol, "exec"), namespace)  # the code is this module's own
    return Translation([namespace[f"block{index}"] for index in range(len(blocks))], operands.registers)


def _emit(operands: Operands, made: Instruction, position: int, block: int, targets: dict[str, int]) -> list[str]:
    try:
        name = made.parts[0]
        if name == "bra":
            return [_emit_branch(operands, made, block, targets)]
        if name in _PLACED:
            return _PLACED[name](operands, made, position)
        return _unmodelled(made) if made.guard else ARITHMETIC[name](operands, made)
    except (KeyError, IndexError, UnmodelledInstructionError) as error:
        where = f"line {made.line}, {made.text}"
        raise UnmodelledInstructionError(f"the PTX machine does not model this instruction: {where}") from error


def _emit_branch(operands: Operands, made: Instruction, block: int, targets: dict[str, int]) -> str:
    target = targets[made.operands[0]]
    if made.guard is None:
        return f"return {target}"
    return f"return S.branch({operands.bits(made.guard.register)}, {made.guard.negated}, {target}, {block + 1})"


def _return(operands: Operands, made: Instruction, position: int) -> list[str]:
    return ["return -1"] if made.guard is None else _unmodelled(made)


def _barrier(operands: Operands, made: Instruction, position: int) -> list[str]:
    if made.parts[1:] == ["warp", "sync"] and made.operands == ("-1",):
        return ["pass  # lanes of a warp run together here; what they exchange is noted, not judged"]
    whole = made.parts[1] == "sync" and made.operands == ("0",) and made.guard is None
    return ["S.barrier()"] if whole else _unmodelled(made)


def _load(operands: Operands, made: Instruction, position: int) -> list[str]:
    if made.parts[1] == "param":
        return [_load_parameter(operands, made)]
    space = _space(made)
    target, address = made.operands
    at = operands.address(address, shared=space == "shared")
    width = f"u{8 * NUMBER_TYPES[made.parts[-1]].itemsize}"
    return [f"S.load_{space}({position}, {at}, {operands.mask(made)}, {width}, {operands.indices(target)})"]


def _store(operands: Operands, made: Instruction, position: int) -> list[str]:
    space = _space(made)
    address, source = made.operands
    bits = f"b{8 * NUMBER_TYPES[made.parts[-1]].itemsize}"
    stored = ", ".join(operands.typed(element, bits) for element in elements(source))
    at = operands.address(address, shared=space == "shared")
    return [f"S.store_{space}({position}, {at}, {operands.mask(made)}, u{bits[1:]}, [{stored}])"]


def _space(made: Instruction) -> str:
    space = made.parts[1].removesuffix("::cta")
    if space not in ("global", "shared"):
        raise UnmodelledInstructionError(made.text)
    return space


def _load_parameter(operands: Operands, made: Instruction) -> str:
    index = re.search(r"_param_(\d+)", made.operands[1])
    if index is None:
        raise UnmodelledInstructionError(made.text)
    kind, kept = NUMBER_TYPES[made.parts[-1]], operands.width(made.operands[0])
    expression = f"S.parameter({index[1]}, u{8 * kind.itemsize})"
    if kept.itemsize != kind.itemsize:
        signed = kind.kind == "i"
        name = f"{'s' if signed else 'u'}{8 * kind.itemsize}"
        wide = f"{'s' if signed else 'u'}{8 * kept.itemsize}"
        expression += f".view({name}).astype({wide}).view(u{8 * kept.itemsize})"
    return f"{operands.bits(made.operands[0])} = {expression}"


def _copy(operands: Operands, made: Instruction, position: int) -> list[str]:
    what = made.parts[2]
    if what == "commit_group":
        return ["S.commit_copies()"]
    if what == "wait_group":
        return [f"S.wait_copies({int(made.operands[0], 0)})"]
    if what == "wait_all":
        return ["S.commit_copies()", "S.wait_copies(0)"]
    if made.parts[:2] != ["cp", "async"] or what not in ("ca", "cg"):
        return _unmodelled(made)
    target, source, size, *taken = made.operands
    part = operands.uniform(taken[0], "u32") if taken else "None"
    to, start = operands.address(target, shared=True), operands.address(source, shared=False)
    return [f"S.copy_async({position}, {to}, {start}, {int(size, 0)}, {part}, {operands.mask(made)})"]


def _load_matrix(operands: Operands, made: Instruction, position: int) -> list[str]:
    target, address = made.operands
    at, count, transposed = _matrix_operands(operands, made, address)
    return [f"S.load_matrix({position}, {at}, {count}, {transposed}, {operands.indices(target)})"]


def _store_matrix(operands: Operands, made: Instruction, position: int) -> list[str]:
    address, source = made.operands
    at, count, transposed = _matrix_operands(operands, made, address)
    stored = ", ".join(operands.bits(name) for name in elements(source))
    return [f"S.store_matrix({position}, {at}, {count}, {transposed}, [{stored}])"]


def _matrix_operands(operands: Operands, made: Instruction, address: str) -> tuple[str, int, bool]:
    if made.guard or "m8n8" not in made.parts or made.parts[-1] != "b16":
        raise UnmodelledInstructionError(made.text)
    return operands.address(address, shared=True), int(made.parts[4][1:]), "trans" in made.parts


def _multiply_matrices(operands: Operands, made: Instruction, position: int) -> list[str]:
    shape, kind = made.parts[3], made.parts[7]
    modelled = {("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32")}
    if (shape, kind) not in modelled or made.parts[6] != "f32" or made.guard:
        return _unmodelled(made)
    targets, *factors = (elements(operand) for operand in made.operands)
    lists = ("[" + ", ".join(operands.uniform(e, "b32") for e in factor) + "]" for factor in factors)
    found = ", ".join(operands.bits(name) for name in targets)
    return [f"{found} = multiply_matrices({shape!r}, {kind!r}, {', '.join(lists)}, {operands.truncate})"]


def _warpgroup(operands: Operands, made: Instruction, position: int) -> list[str]:
    what = made.parts[1]
    if what == "fence":
        return []
    if what == "commit_group":
        return ["S.commit_products()"]
    if what == "wait_group":
        return [f"S.wait_products({int(made.operands[0], 0)})"]
    kind = made.parts[-1]
    targets, left, right, added, *options = made.operands
    if what != "mma_async" or made.parts[5] != "f32" or kind not in ("f16", "bf16", "tf32") or made.guard:
        return _unmodelled(made)
    if options[:2] != ["1", "1"]:
        return _unmodelled(made)
    turned = [option == "1" for option in options[2:]] or [False]
    transposed = (turned[0], turned[1]) if len(turned) == 2 else (False, turned[0])
    factor = "" if left.startswith("{") else operands.bits(left)
    if left.startswith("{"):
        factor = "[" + ", ".join(operands.uniform(element, "b32") for element in elements(left)) + "]"
    onto = operands.bits(added) if added.startswith("%") else str(added != "0")
    into = operands.indices(targets)
    return [
        f"S.multiply_warpgroups({position}, {kind!r}, {factor}, {operands.bits(right)}, {onto}, {transposed}, {into})"
    ]


def _fence(operands: Operands, made: Instruction, position: int) -> list[str]:
    return [] if made.operation == "fence.proxy.async.shared::cta" else _unmodelled(made)


def _shuffle(operands: Operands, made: Instruction, position: int) -> list[str]:
    target, source, lane, clamp, members = made.operands
    if clamp != ("0" if made.parts[2] == "up" else "31") or members != "-1" or made.guard:
        return _unmodelled(made)
    to, bits = operands.bits(target.split("|")[0]), operands.bits(source)
    if lane.startswith("%"):
        return (
            [f"{to} = shuffle_by_index({bits}, {operands.bits(lane)})"] if made.parts[2] == "idx" else _unmodelled(made)
        )
    lower = numerics.LANES - int(lane, 0)
    orders = {
        "bfly": numerics.LANES ^ int(lane, 0), "idx": np.zeros(32, int) + int(lane, 0),
        "up": np.where(lower < 0, numerics.LANES, lower),
    }  # fmt: skip
    return [f"{to} = permute_lanes({bits}, {operands.constant(orders[made.parts[2]])})"]


def _reduce(operands: Operands, made: Instruction, position: int) -> list[str]:
    target, source, members = made.operands
    if made.parts[2] not in ("min", "max", "add") or made.guard:
        return _unmodelled(made)
    kind = made.parts[-1] if made.parts[-1] in ("s32", "f32") else "u32"
    everyone = operands.uniform(members, "b32")
    reduced = f"reduce_warp({operands.bits(source)}, {everyone}, {made.parts[2]!r}, {kind})"
    return [f"{operands.bits(target)} = {reduced}"]


def _unmodelled(made: Instruction) -> list[str]:
    raise UnmodelledInstructionError(made.text)


_PLACED: dict[str, Callable[[Operands, Instruction, int], list[str]]] = {
    "ret": _return, "bar": _barrier, "ld": _load, "st": _store, "cp": _copy, "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix, "mma": _multiply_matrices, "shfl": _shuffle, "redux": _reduce, "wgmma": _warpgroup,
    "fence": _fence,
}  # fmt: skip
"""Emitters of the instructions that name their own position, or that touch memory or other lanes."""
