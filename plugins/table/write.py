"""Write the table: the kernels, which PyTorch reads and the C++ library carries, and a header that the library is compiled from.

`kernels.bin` is `fna.plugins.table.kernel_file`'s. `launch_constants.hpp` holds the numbers of the launch plan, so that none is typed
in C++. Beside them, for `fna.plugins.ptx` and not shipped: `ptx/`, the PTX that the assembler turned into each chip's image, and
`ptx.json`, with the image's SHA-256 for each.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fna.chebyshev import MAX_CHEBYSHEV_STEPS
from fna.plan import ITERATIONS_OF_VERSION_1
from fna.plugins import focal_plan, launch_plan
from fna.plugins.built import CONSTANTS, KERNEL_FILE
from fna.plugins.table.chips import OLDEST_CHIP
from fna.plugins.table.compile import Compiled, write_bytes
from fna.plugins.table.kernel_file import CompiledKernel, join_kernels, pack


def write_table(compiled: Sequence[Compiled], output: Path) -> None:
    """Write all files of a table, each whole or not at all."""
    packed = []
    for built in sorted(compiled, key=lambda e: (e.variant, e.sm)):
        raw = Path(built.image).read_bytes()
        kernel = CompiledKernel(
            built.variant, built.sm, 0, 0, len(raw), built.shared, built.warps, built.symbol, built.layout
        )
        packed.append((kernel, pack(raw)))
    output.mkdir(parents=True, exist_ok=True)
    write_library_files(join_kernels(packed), output)
    _write_ptx(compiled, output)


def _write_ptx(compiled: Sequence[Compiled], output: Path) -> None:
    """Write the PTX of every chip's image, compressed, and what a launch of it needs."""
    folder = output / "ptx"
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, str | int]] = []
    for kernel in sorted((e for e in compiled if e.ptx), key=lambda e: (e.variant, e.sm)):
        name = f"{kernel.variant}-sm{kernel.sm}.ptx.z"
        write_bytes(folder / name, zlib.compress(Path(kernel.ptx).read_bytes().rstrip(b"\0")))
        image = hashlib.sha256(Path(kernel.image).read_bytes()).hexdigest()
        row: dict[str, str | int] = {"variant": kernel.variant, "sm": kernel.sm}
        row |= {"file": f"ptx/{name}", "image_sha256": image}
        row |= {"symbol": kernel.symbol, "shared": kernel.shared, "warps": kernel.warps, "layout": kernel.layout}
        rows.append(row)
    for stale in set(folder.glob("*.ptx.z")) - {output / str(row["file"]) for row in rows}:
        stale.unlink()
    write_bytes(output / "ptx.json", json.dumps({"kernels": rows}, indent=1).encode())


def write_library_files(kernels: bytes, output: Path) -> None:
    """Write what the library is made from: the kernels that it will carry, and the header."""
    write_bytes(output / KERNEL_FILE, kernels)
    write_bytes(output / CONSTANTS, launch_constants().encode())


def launch_constants() -> str:
    """The C++ header of the launch plan's numbers: every one stands in Python only."""
    numbers = {
        "MaxLandmarks": launch_plan.MAX_LANDMARKS,
        "MaxHeadSize": launch_plan.MAX_HEAD_SIZE,
        "HeadSizeStep": launch_plan.HEAD_SIZE_STEP,
        "MaxIterations": launch_plan.MAX_ITERATIONS,
        "ImpliedIterations": ITERATIONS_OF_VERSION_1,
        "MaxChebyshevSteps": MAX_CHEBYSHEV_STEPS,
        "MaxGridY": launch_plan.MAX_GRID_Y,
        "MaxStride": launch_plan.MAX_STRIDE,
        "Alignment": launch_plan.ALIGNMENT,
        "PointerAlignment": launch_plan.POINTER_ALIGNMENT,
        "Tile": launch_plan.TILE,
        "FinishColumns": launch_plan.FINISH_COLUMNS,
        "ChebyshevColumns": launch_plan.CHEBYSHEV_COLUMNS,
        "Waves": launch_plan.WAVES,
        "SplitJoined": launch_plan.SPLIT_JOINED,
        "SplitSizes": launch_plan.SPLIT_SIZES,
        "MaxMultiprocessors": launch_plan.MAX_MULTIPROCESSORS,
        "MaxQueryTiles": launch_plan.MAX_QUERY_TILES,
        "FpsOneLaunchTokens": launch_plan.FPS_ONE_LAUNCH_TOKENS,
        "FpsOneLaunchBytes": launch_plan.FPS_ONE_LAUNCH_BYTES,
        "FpsTile": launch_plan.FPS_TILE,
        "MaxHot": launch_plan.MAX_HOT,
        "FocalRows": focal_plan.FOCAL_ROWS,
        "FirstKeys": focal_plan.FIRST_KEYS,
        "ListStep": focal_plan.LIST_STEP,
        "HotSplitTokens": focal_plan.HOT_SPLIT_TOKENS,
        "FewestHotSplits": focal_plan.FEWEST_HOT_SPLITS,
        "AllSteps": focal_plan.ALL_STEPS,
        "Sum": focal_plan.SUM,
        "Select": focal_plan.SELECT,
        "NoMask": launch_plan.NO_MASK,
        "MaskAll": launch_plan.MASK_ALL,
        "MaskButSinks": launch_plan.MASK_BUT_SINKS,
        "OldestChip": OLDEST_CHIP,
    }
    constants = "".join(f"constexpr int64_t k{name} = {value};\n" for name, value in numbers.items())
    paddings = ", ".join(map(str, launch_plan.HEAD_PADDINGS))
    constants += f"constexpr int64_t kHeadPaddings[] = {{{paddings}}};\n"
    dtypes = "".join(
        f'    {{"{dtype}", {launch_plan.ELEMENT_BYTES[dtype]}}},\n' for dtype in launch_plan.DTYPES
    )  # in the order of Dtype
    blocks = "".join(
        f"    {{{position}, {_initialiser(blocks)}}},\n"
        for position, dtype in enumerate(launch_plan.DTYPES)
        for blocks in launch_plan.all_blocks(dtype)
    )
    return (
        "// Written by fna.plugins.table from fna.plugins.launch_plan, which explains the numbers.\n#pragma once\n\n"
        f"#include <cstdint>\n\nnamespace fna\n{{\n\n{constants}\n"
        "enum class Dtype : int32_t\n{\n"
        + "".join(f"    k{_title(dtype)},\n" for dtype in launch_plan.DTYPES)
        + "};\n\n"
        f"struct DtypeFacts {{ char const* name; int64_t bytes; }};\nconstexpr DtypeFacts kDtypes[] = {{\n{dtypes}}};\n\n"
        f"struct CoreBlocks {{{_members(launch_plan.CoreBlocks)} }};\n"
        f"struct Blocks {{ int32_t dtype;{_members(launch_plan.Blocks)} }};\n"
        f"constexpr Blocks kBlocks[] = {{\n{blocks}}};\n\n}} // namespace fna\n"
    )


def _members(kind: type) -> str:
    kinds = {"int": "int64_t", "bool": "bool"}
    return "".join(f" {kinds.get(str(each.type), each.type)} {_camel(each.name)};" for each in fields(kind))


def _initialiser(value: Any) -> str:
    if is_dataclass(value):
        inner = ", ".join(_initialiser(getattr(value, each.name)) for each in fields(value))
        return f"{{{inner}}}" if isinstance(value, launch_plan.CoreBlocks) else inner
    return str(value).lower()


def _title(name: str) -> str:
    return name[0].upper() + name[1:]


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(_title, rest))
