"""Arithmetic, logic, conversion and moves as Python assignments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fna.plugins.ptx.number_types import NUMBER_TYPES, f32, u64
from fna.plugins.ptx.operands import SHARED_SYMBOL, Operands, elements, immediate, stored_as
from fna.plugins.ptx.parsing import Instruction, UnmodelledInstructionError

_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", **_LOGIC}
_COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_FP32 = {
    "add": (2, "{0} + {1}"), "sub": (2, "{0} - {1}"), "mul": (2, "{0} * {1}"), "div": (2, "{0} / {1}"),
    "fma": (3, "fused_multiply_add({0}, {1}, {2})"), "max": (2, "np.fmax({0}, {1})"), "min": (2, "np.fmin({0}, {1})"),
    "neg": (1, "-{0}"), "abs": (1, "np.abs({0})"), "rcp": (1, "f32.type(1) / {0}"), "sqrt": (1, "np.sqrt({0})"),
    "rsqrt": (1, "f32.type(1) / np.sqrt({0})"), "lg2": (1, "np.log2({0})"), "tanh": (1, "np.tanh({0})"),
}  # fmt: skip


def _compare(operands: Operands, made: Instruction) -> list[str]:
    comparison, kind = made.parts[1], made.parts[-1]
    left, right = operands.typed(made.operands[1], kind), operands.typed(made.operands[2], kind)
    either_nan = f"np.isnan({left}) | np.isnan({right})"
    unordered = len(comparison) == 3 and comparison.endswith("u")
    if comparison in ("num", "nan"):
        expression = either_nan if comparison == "nan" else f"~({either_nan})"
    elif unordered:
        expression = f"({left} {_COMPARISONS[comparison[:2]]} {right}) | {either_nan}"
    elif kind == "f32" and comparison == "ne":
        expression = f"({left} != {right}) & ~({either_nan})"
    else:
        expression = f"{left} {_COMPARISONS[comparison]} {right}"
    if len(made.parts) > 3:
        expression = f"({expression}) {_LOGIC[made.parts[2]]} {operands.typed(made.operands[3], 'pred')}"
    return [f"{operands.bits(made.operands[0])} = {expression}"]


def _move(operands: Operands, made: Instruction) -> list[str]:
    target, source = made.operands
    kind = made.parts[-1]
    if target.startswith("{"):
        return _unpack(operands, target, source, kind)
    if source.startswith("{"):
        parts = elements(source)
        bits = 8 * NUMBER_TYPES[kind].itemsize // len(parts)
        wide = f"u{8 * NUMBER_TYPES[kind].itemsize}"
        shifted = (
            f"({operands.typed(part, f'b{bits}')}.astype({wide}) << {operands.number(i * bits, wide)})"
            for i, part in enumerate(parts)
        )
        return [f"{operands.bits(target)} = {' | '.join(shifted)}"]
    if kind == "pred":
        constant = f"S.constant({source != '0'}, np.dtype(bool))"
        return [f"{operands.bits(target)} = {operands.typed(source, 'pred') if source.startswith('%') else constant}"]
    width = operands.width(target)
    if source.startswith("%"):
        return [f"{operands.bits(target)} = {operands.typed(source, f'b{8 * width.itemsize}')}"]
    taken = np.array([0 if source == SHARED_SYMBOL else immediate(source, NUMBER_TYPES[kind])])
    bits_held = int(taken.view(f"u{taken.itemsize}")[0])
    return [f"{operands.bits(target)} = S.constant({bits_held}, u{8 * width.itemsize})"]


def _unpack(operands: Operands, target: str, source: str, kind: str) -> list[str]:
    parts = elements(target)
    size = NUMBER_TYPES[kind].itemsize // len(parts)
    lines = [f"whole = {operands.bits(source)}"]
    for i, part in enumerate(parts):
        if part != "_":
            shift = operands.number(8 * i * size, f"u{8 * NUMBER_TYPES[kind].itemsize}")
            lines.append(f"{operands.bits(part)} = (whole >> {shift}).astype(u{8 * size})")
    return lines


def _logic(operands: Operands, made: Instruction) -> list[str]:
    target, *sources = made.operands
    kind = made.parts[-1]
    values = [operands.typed(source, kind) for source in sources]
    expression = f"~{values[0]}" if made.parts[0] == "not" else f"{values[0]} {_LOGIC[made.parts[0]]} {values[1]}"
    suffix = "" if kind == "pred" else stored_as(operands, target)
    return [f"{operands.bits(target)} = ({expression}){suffix}"]


def _select(operands: Operands, made: Instruction) -> list[str]:
    target, *choices, predicate = made.operands
    bits = f"b{8 * NUMBER_TYPES[made.parts[-1]].itemsize}"
    picked = (
        operands.typed(c, bits)
        if c.startswith("%")
        else operands.constant(np.array([immediate(c, NUMBER_TYPES[made.parts[-1]])]).view(NUMBER_TYPES[bits])[0])
        for c in choices
    )
    return [f"{operands.bits(target)} = np.where({operands.typed(predicate, 'pred')}, {', '.join(picked)})"]


def _convert(operands: Operands, made: Instruction) -> list[str]:
    target, *sources = made.operands
    to, source = made.parts[-2], made.parts[-1]
    if to in ("f16x2", "bf16x2"):
        high, low = (_half_bits(operands, s, to) for s in sources)
        return [f"{operands.bits(target)} = ({high} << {operands.number(16, 'u32')}) | {low}"]
    bits = operands.typed(sources[0], "b32") if to in ("bf16", "tf32") else ""
    if to == "bf16":
        return [f"{operands.bits(target)} = to_bf16({bits}).astype(u16)"]
    if to == "tf32" and made.parts[1] == "rna":
        return [f"{operands.bits(target)} = to_tf32({bits})"]
    if source == "bf16" and to == "f32":
        return [f"{operands.bits(target)} = {_widened_bf16(operands, sources[0])}"]
    expression = operands.typed(sources[0], source)
    if "rzi" in made.parts:
        expression = f"np.trunc({expression})"
    sign = {"u": "u", "i": "s", "f": "f"}[NUMBER_TYPES[to].kind]
    expression += f".astype({sign}{8 * NUMBER_TYPES[to].itemsize})"
    width = operands.width(target)
    if width.itemsize != NUMBER_TYPES[to].itemsize:
        expression += f".astype({sign}{8 * width.itemsize})"
    return [f"{operands.bits(target)} = {expression}{stored_as(operands, target)}"]


def _half_bits(operands: Operands, source: str, to: str) -> str:
    if to == "bf16x2":
        return f"to_bf16({operands.uniform(source, 'b32')})"
    return f"{operands.uniform(source, 'b32')}.view(f32).astype(f16).view(u16).astype(u32)"


def _widened_bf16(operands: Operands, source: str) -> str:
    """fp32 bits of a bf16 register."""
    return f"({operands.typed(source, 'b16')}.astype(u32) << {operands.number(16, 'u32')})"


def _arithmetic(operands: Operands, made: Instruction) -> list[str]:
    name, kind = made.parts[0], made.parts[-1]
    target, *sources = made.operands
    if len(made.parts) > 2 and made.parts[-2] == "f32" and kind in ("f16", "bf16"):
        return _mixed(operands, made)
    if kind == "f32x2":
        return _fp32_pair(operands, made)
    if kind == "f32":
        return [f"{operands.bits(target)} = ({_fp32(operands, made)}){stored_as(operands, target)}"]
    if name in ("mul", "mad") and made.parts[1] in ("wide", "hi"):
        return _wide_product(operands, made)
    if len(sources) != {"mad": 3, "neg": 1, "abs": 1}.get(name, 2) or NUMBER_TYPES[kind].kind == "f":
        raise UnmodelledInstructionError(made.text)
    values = [operands.typed(source, kind) for source in sources]
    if name in ("neg", "abs"):
        expression = f"-{values[0]}" if name == "neg" else f"np.abs({values[0]})"
    elif name in ("min", "max"):
        expression = f"np.{name}imum({values[0]}, {values[1]})"
    elif name == "mad":
        expression = f"{values[0]} * {values[1]} + {values[2]}"
    else:
        expression = f"{values[0]} {_INFIX[name]} {values[1]}"
    return [f"{operands.bits(target)} = ({expression}){stored_as(operands, target)}"]


def _fp32(operands: Operands, made: Instruction) -> str:
    name = made.parts[0]
    values = [operands.typed(source, "f32") for source in made.operands[1:]]
    if name == "ex2":
        return f"exp2({values[0]}, {'ftz' in made.parts})"
    if "ftz" in made.parts or "NaN" in made.parts:
        raise UnmodelledInstructionError(made.text)
    arity, template = _FP32[name]
    if name in ("min", "max") and len(values) == 3:
        values = [template.format(*values[:2]), values[2]]
    if len(values) != arity:
        raise UnmodelledInstructionError(made.text)
    return template.format(*values)


def _mixed(operands: Operands, made: Instruction) -> list[str]:
    """Factors of 16 bits, the rest fp32."""
    target, *factors, last = made.operands
    widened = [
        f"{operands.typed(f, 'f16')}.astype(f32)"
        if made.parts[-1] == "f16"
        else f"{_widened_bf16(operands, f)}.view(f32)"
        for f in factors
    ]
    values = [*widened, operands.typed(last, "f32")]
    _, template = _FP32[made.parts[0]]
    return [f"{operands.bits(target)} = ({template.format(*values)}).view(u32)"]


def _fp32_pair(operands: Operands, made: Instruction) -> list[str]:
    target, *sources = made.operands
    values = [
        f"unpack_fp32_pair({operands.bits(s)})"
        if s.startswith("%")
        else operands.constant(np.array([int(immediate(s, u64))], u64).view(f32).reshape(1, 2))
        for s in sources
    ]
    _, template = _FP32[made.parts[0]]
    return [f"{operands.bits(target)} = pack_fp32_pair({template.format(*values)})"]


def _wide_product(operands: Operands, made: Instruction) -> list[str]:
    target, left, right, *added = made.operands
    kind = made.parts[-1]
    bits = 8 * NUMBER_TYPES[kind].itemsize
    wide = f"{kind[0]}{2 * bits}"
    product = f"{operands.typed(left, kind)}.astype({wide}) * {operands.typed(right, kind)}"
    out = stored_as(operands, target)
    if made.parts[1] == "wide":
        total = f" + {operands.typed(added[0], f'b{2 * bits}')}" if added else ""
        return [f"{operands.bits(target)} = ({product}){out}{total}"]
    if bits != 32 or added:
        raise UnmodelledInstructionError(made.text)
    shift = operands.number(32, wide)
    return [f"{operands.bits(target)} = (({product}) >> {shift}).astype({kind}){out}"]


def _shift(operands: Operands, made: Instruction) -> list[str]:
    target, source, count = made.operands
    kind = made.parts[-1]
    bits, shifted = 8 * NUMBER_TYPES[kind].itemsize, operands.typed(source, kind)
    symbol = "<<" if made.parts[0] == "shl" else ">>"
    typed = kind if kind[0] == "s" else f"u{bits}"
    zero = operands.number(0, kind)
    if not count.startswith("%"):
        amount = int(count, 0)
        expression = f"{shifted} {symbol} {operands.number(amount, kind)}" if amount < bits else f"{shifted} * {zero}"
    else:
        by = operands.typed(count, "u32")
        clamped = f"np.minimum({by}, {operands.number(bits - 1, 'u32')}).astype({typed})"
        expression = f"{shifted} {symbol} {clamped}"
        if kind[0] != "s":
            expression = f"np.where({by} >= {operands.number(bits, 'u32')}, {zero}, {expression})"
    return [f"{operands.bits(target)} = ({expression}){stored_as(operands, target)}"]


def _divide(operands: Operands, made: Instruction) -> list[str]:
    target, left, right = made.operands
    name, kind = made.parts[0], made.parts[-1]
    if kind == "f32":
        return _arithmetic(operands, made)
    above, below = operands.typed(left, kind), operands.typed(right, kind)
    to, out = operands.bits(target), stored_as(operands, target)
    if kind == "s32":
        quotient = f"divide_signed({above}, {below})"
        return [f"{to} = ({quotient if name == 'div' else f'{above} - {quotient} * {below}'}){out}"]
    if kind[0] != "u":
        raise UnmodelledInstructionError(made.text)
    return [f"{to} = ({above} {'//' if name == 'div' else '%'} np.maximum({below}, {operands.number(1, kind)})){out}"]


def _extract_bits(operands: Operands, made: Instruction) -> list[str]:
    target, source, position, length = made.operands
    start, count = int(position, 0), int(length, 0)
    bits = operands.typed(source, "b32")
    if made.parts[-1] == "u32":
        kept = operands.number((1 << count) - 1, "u32")
        return [f"{operands.bits(target)} = ({bits} >> {operands.number(start, 'u32')}) & {kept}"]
    up, down = operands.number(32 - start - count, "u32"), operands.number(32 - count, "s32")
    return [f"{operands.bits(target)} = (({bits} << {up}).view(s32) >> {down}).view(u32)"]


def _permute_bytes(operands: Operands, made: Instruction) -> list[str]:
    target, low, high, selector = made.operands
    chosen = int(selector.removesuffix("U"), 0)
    both = f"({operands.typed(low, 'b32')}.astype(u64) | ({operands.typed(high, 'b32')}.astype(u64) << {operands.number(32, 'u64')}))"
    picked = (
        f"((({both} >> {operands.number(8 * (chosen >> 4 * i & 7), 'u64')}) & {operands.number(255, 'u64')})"
        f" << {operands.number(8 * i, 'u64')})"
        for i in range(4)
    )
    return [f"{operands.bits(target)} = ({' | '.join(picked)}).astype(u32)"]


def _look_up(operands: Operands, made: Instruction) -> list[str]:
    """lop3: any function of three bits, as the sum of its minterms."""
    target, *sources, table = made.operands
    values = [operands.typed(source, "b32") for source in sources]
    minterms = (
        "(" + " & ".join(("" if row >> (2 - i) & 1 else "~") + f"({value})" for i, value in enumerate(values)) + ")"
        for row in range(8)
        if int(table, 0) >> row & 1
    )
    return [f"{operands.bits(target)} = {' | '.join(minterms) or f'0 * {values[0]}'}"]


def _count_bits(operands: Operands, made: Instruction) -> list[str]:
    target, source = made.operands
    return [f"{operands.bits(target)} = count_bits({operands.typed(source, 'b32')})"]


ARITHMETIC: dict[str, Callable[[Operands, Instruction], list[str]]] = {
    **dict.fromkeys(("add", "sub", "mul", "mad", "fma", "min", "max", "neg", "abs"), _arithmetic),
    **dict.fromkeys(("rcp", "sqrt", "rsqrt", "lg2", "tanh", "ex2"), _arithmetic),
    **dict.fromkeys(("and", "or", "xor", "not"), _logic),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("div", "rem"), _divide),
    "setp": _compare, "mov": _move, "selp": _select, "cvt": _convert, "bfe": _extract_bits, "prmt": _permute_bytes,
    "lop3": _look_up, "popc": _count_bits,
}  # fmt: skip
"""Emitters by the operation's name."""
