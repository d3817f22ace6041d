"""Compile one kernel variant for one chip, in a cache named by everything that goes into it. Nothing here needs a GPU."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fna.errors import BuildError, MissingCapabilityError
from fna.files import written_whole
from fna.plugins.launch_plan import KernelVariant
from fna.plugins.table.chips import FALLBACK, FALLBACK_PTX_VERSION, FALLBACK_TARGET


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel and what is needed to launch it. `shared` is dynamic, in bytes; `sm` 0 is PTX.

    `image` and `ptx` are files: what a driver loads, and the PTX that it was assembled from.
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


def compile_variant(variant: KernelVariant, target: int, cache: Path) -> dict[int, Compiled]:
    """Compile one variant for one chip, or take it from the cache; runs in a worker.

    Returns:
        The entry of the chip; for sm_80 the entry of the fallback too, since its PTX is written on the way.
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
    # Triton's key of a kernel covers its source, that of every function it calls, and the constants that they use.
    key = json.dumps(
        [kernel.cache_key, variant.name, target, constants, options, signature, aligned, triton.__version__, 2]
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
    entry = Compiled(
        variant=variant.name, sm=target, symbol=meta.name, shared=meta.shared, static_shared=usage["SHARED"],
        warps=meta.num_warps, registers=usage["REG"], stack=usage["STACK"],
        layout=registry.parameter_layout(variant), image=str(images[target]), ptx=str(text),
    )  # fmt: skip
    write_bytes(record, json.dumps(asdict(entry)).encode())
    return {sm: replace(entry, sm=sm, image=str(image)) for sm, image in images.items()}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False)
    usage = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", done.stdout + done.stderr))
    if len(usage) != 3:
        raise BuildError(f"cuobjdump did not say what the kernel uses: {(done.stdout + done.stderr).strip()[:200]}")
    return {name: int(value) for name, value in usage.items()}


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole, unless it holds the same: then its time stays, so that what was built from it is not built again."""
    if path.is_file() and path.read_bytes() == data:
        return
    with written_whole(path) as temporary:
        temporary.write_bytes(data)
