"""Compile one kernel variant for one chip, in a cache named by everything that goes into it. Nothing here needs a GPU."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fna.errors import BuildError, MissingCapabilityError
from fna.files import written_whole
from fna.plugins.launch_plan import KernelVariant
from fna.plugins.table.chips import FALLBACK, FALLBACK_PTX_VERSION, FALLBACK_TARGET


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel and what is needed to launch it. `shared` is dynamic, in bytes; `sm` 0 is PTX.

    `image` and `ptx` are files: what a driver loads, and the PTX that it was assembled from. `toolkit` is the CUDA release of the
    assembler, as in "12.9"; a driver of an earlier major release refuses the image.
    """

    variant: str
    sm: int
    symbol: str
    shared: int
    static_shared: int
    warps: int
    registers: int
    stack: int
    layout: str
    image: str
    ptx: str = ""
    toolkit: str = ""


def compile_variant(variant: KernelVariant, target: int, cache: Path) -> dict[int, Compiled]:
    """Compile one variant for one chip, or take it from the cache; runs in a worker.

    Returns:
        The kernel of the chip; for sm_80 the kernel of the fallback too, since its PTX is written on the way.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise MissingCapabilityError(
            "the kernels are compiled with Triton, which is not installed: pip install triton"
        ) from error
    from fna.plugins.kernels import registry

    kernel = registry.KERNELS[variant.kernel]
    constants, options = registry.constants(variant), registry.options(variant, target)
    if target == FALLBACK_TARGET:
        options["ptx_version"] = FALLBACK_PTX_VERSION
    signature, aligned = registry.signature(variant), registry.multiples_of_16(variant)
    assembler = oldest_assembler(target)
    # Triton's key of a kernel covers its source, that of every function it calls, and the constants that they use.
    key = json.dumps(
        [kernel.cache_key, variant.name, target, constants, options, signature, aligned, triton.__version__]
        + [assembler.version, 3]
    )
    stem = cache / f"{variant.name}-{target}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    text = stem.with_suffix(".ptx")
    images = {target: stem.with_suffix(".cubin"), **({FALLBACK: text} if target == FALLBACK_TARGET else {})}
    record = stem.with_suffix(".json")
    if record.exists() and all(path.exists() for path in (*images.values(), text)):
        known = json.loads(record.read_text())
        return {
            sm: Compiled(**{**known, "sm": sm, "image": str(image), "ptx": str(text)}) for sm, image in images.items()
        }

    names = list(signature)
    with triton.knobs.nvidia.scope():
        triton.knobs.nvidia.ptxas = triton.knobs.nvidia.ptxas_blackwell = assembler.path
        built = triton.compile(
            ASTSource(
                kernel,
                signature,
                constexprs={(names.index(name),): value for name, value in constants.items()},
                attrs={(position,): [["tt.divisibility", 16]] for position in aligned},
            ),
            target=GPUTarget("cuda", target, 32),
            options=options,
        )
    meta = built.metadata
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise BuildError(
            f"{variant.name} on sm_{target} wants Triton's own scratch memory, which the launcher does not give"
        )
    usage = _resource_usage(built.asm["cubin"])
    write_bytes(images[target], built.asm["cubin"])
    write_bytes(text, built.asm["ptx"].encode() + b"\0")
    compiled = Compiled(
        variant=variant.name, sm=target, symbol=meta.name, shared=meta.shared, static_shared=usage["SHARED"],
        warps=meta.num_warps, registers=usage["REG"], stack=usage["STACK"],
        layout=registry.parameter_layout(variant), image=str(images[target]), ptx=str(text),
        toolkit=toolkit_of(built.asm["cubin"]),
    )  # fmt: skip
    write_bytes(record, json.dumps(asdict(compiled)).encode())
    return {sm: replace(compiled, sm=sm, image=str(image)) for sm, image in images.items()}


@cache
def oldest_assembler(target: int) -> Any:
    """Return the oldest of Triton's assemblers that knows a chip, as Triton's `NvidiaTool`.

    Triton 3.9 itself takes the newest from sm_90 on, whose images drivers before CUDA 13 (580) refuse.

    Raises:
        BuildError: if none knows it.
    """
    from triton import knobs

    tools = {tool.path: tool for tool in (knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell)}
    for tool in sorted(tools.values(), key=lambda each: tuple(map(int, each.version.split(".")))):
        said = subprocess.run([tool.path, "--help"], capture_output=True, text=True, check=False).stdout
        if f"'sm_{target}'" in said:
            return tool
    raise BuildError(f"none of Triton's assemblers knows sm_{target}; install a newer one: pip install -U triton")


def toolkit_of(cubin: bytes) -> str:
    """Return the CUDA release that a cubin was assembled by, such as "12.9".

    Raises:
        BuildError: if the image does not say.
    """
    said = _cuobjdump(cubin, "-elf")
    found = re.search(r"toolkit=(\d+)\.?(\d)\b", said)  # 129 up to sm_89, 12.9 from sm_90 on
    if found is None:
        raise BuildError(f"cuobjdump did not say which CUDA assembled the kernel: {said[:200]}")
    return f"{found[1]}.{found[2]}"


def _resource_usage(cubin: bytes) -> dict[str, int]:
    said = _cuobjdump(cubin, "-res-usage")
    usage = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", said))
    if len(usage) != 3:
        raise BuildError(f"cuobjdump did not say what the kernel uses: {said[:200]}")
    return {name: int(value) for name, value in usage.items()}


def _cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, unless it holds the same: then its time stays, so that what was built from it is not built again."""
    if path.is_file() and path.read_bytes() == data:
        return
    with written_whole(path) as temporary:
        temporary.write_bytes(data)
