"""Compile one kernel variant for one chip, in a cache named by everything that goes into it. Nothing here needs a GPU."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fna.errors import BuildError, MissingCapabilityError
from fna.files import written_whole
from fna.plugins.launch_plan import KernelVariant
from fna.plugins.table.chips import FALLBACK, FALLBACK_PTX_VERSION, FALLBACK_TARGET, compiled_as


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


def compile_variant(variant: KernelVariant, chips: Sequence[int], cache: Path) -> dict[int, Compiled]:
    """Compile one variant, or take it from the cache, for chips (0 is the fallback) that share their PTX; runs in a worker.

    Triton compiles once, for the chip that the others take their PTX from; only the assembler runs for each.
    """
    try:
        import triton
    except ImportError as error:
        raise MissingCapabilityError(
            "the kernels are compiled with Triton, which is not installed: pip install triton"
        ) from error
    from fna.plugins.kernels import registry

    (target,) = {compiled_as(sm) for sm in chips}
    if not registry.has_gluon():
        raise MissingCapabilityError(
            f"the table is compiled with Triton {'.'.join(map(str, registry.GLUON_SINCE))} or later, and {triton.__version__} is "
            "installed: pip install -U triton"
        )
    kernel = registry.kernel_of(variant, target)
    constants, options = registry.constants(variant), registry.options(variant, target)
    if target == FALLBACK_TARGET:
        options["ptx_version"] = FALLBACK_PTX_VERSION
    signature, aligned = registry.signature(variant), registry.multiples_of_16(variant)
    # Triton's key of a kernel covers its source, that of every function it calls, and the constants that they use.
    key = json.dumps(
        [kernel.cache_key, variant.name, target, constants, options, signature, aligned, triton.__version__]
        + [oldest_assembler(target).version, 5]
    )
    stem = f"{variant.name}-{{}}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    own = _CacheFiles(cache / stem.format(target))
    if not own.complete():
        own.write(*_compile(variant, target, constants, options))
    compiled: dict[int, Compiled] = {}
    for sm in chips:
        files = own if sm == FALLBACK else _CacheFiles(cache / stem.format(sm))
        if not files.complete():
            files.write(*_assembled_again(own, sm, options))
        image = files.ptx if sm == FALLBACK else files.cubin
        compiled[sm] = Compiled(variant.name, sm, **files.usage(), image=str(image), ptx=str(files.ptx))
    return compiled


@dataclass(frozen=True)
class _CacheFiles:
    """One chip's image, the PTX that it was made of, and a record of what the image uses; names differ by their suffix."""

    stem: Path

    @property
    def cubin(self) -> Path:
        return self.stem.with_suffix(".cubin")

    @property
    def ptx(self) -> Path:
        return self.stem.with_suffix(".ptx")

    @property
    def record(self) -> Path:
        return self.stem.with_suffix(".json")

    def complete(self) -> bool:
        return all(path.exists() for path in (self.cubin, self.ptx, self.record))

    def usage(self) -> dict[str, Any]:
        return dict(json.loads(self.record.read_text()))

    def write(self, cubin: bytes, ptx: str, usage: dict[str, Any]) -> None:
        write_bytes(self.cubin, cubin)
        write_bytes(self.ptx, ptx.encode() + b"\0")  # the driver reads PTX to its zero
        write_bytes(self.record, json.dumps(usage).encode())


def _compile(
    variant: KernelVariant, target: int, constants: dict[str, Any], options: dict[str, Any]
) -> tuple[bytes, str, dict[str, Any]]:
    """Let Triton make image and PTX; return them with what the image uses."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fna.plugins.kernels import registry

    kernel = registry.kernel_of(variant, target)
    signature = registry.signature(variant)
    names = list(signature)
    with _assembler(target):
        built = triton.compile(
            _source_class(kernel)(
                kernel,
                signature,
                constexprs={(names.index(name),): value for name, value in constants.items()},
                attrs={(position,): [["tt.divisibility", 16]] for position in registry.multiples_of_16(variant)},
            ),
            target=GPUTarget("cuda", target, 32),
            options=options,
        )
    made, cubin = built.metadata, built.asm["cubin"]
    if made.global_scratch_size or made.profile_scratch_size:
        raise BuildError(
            f"{variant.name} on sm_{target} wants Triton's own scratch memory, which the launcher does not give"
        )
    asked = {"symbol": made.name, "shared": made.shared, "warps": made.num_warps}
    return cubin, built.asm["ptx"], {**asked, "layout": registry.parameter_layout(variant), **_image_facts(cubin)}


def _source_class(kernel: Any) -> Any:
    """What Triton compiles a kernel as."""
    if kernel.is_gluon():
        from triton.experimental.gluon import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def _assembled_again(own: _CacheFiles, sm: int, options: dict[str, Any]) -> tuple[bytes, str, dict[str, Any]]:
    """Assemble the PTX that was made for another chip for this one; return as `_compile` does."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    # PTX of sm_100a is for that chip alone unless it is relabelled; PTX of sm_80 is for every later chip as it stands.
    ptx = re.sub(r"^\.target sm_\d+a", f".target sm_{sm}a", own.ptx.read_bytes().rstrip(b"\0").decode(), flags=re.M)
    backend = make_backend(GPUTarget("cuda", sm, 32))
    with _assembler(sm):
        cubin = backend.make_cubin(ptx, {}, backend.parse_options({**options, "arch": f"sm{sm}"}), sm)
    return cubin, ptx, {**own.usage(), **_image_facts(cubin)}


def _image_facts(cubin: bytes) -> dict[str, Any]:
    """What an image uses and which CUDA made it, as `Compiled` has it."""
    usage = _resource_usage(cubin)
    return {
        "static_shared": usage["SHARED"],
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "toolkit": toolkit_of(cubin),
    }


@contextmanager
def _assembler(sm: int) -> Iterator[None]:
    """Let Triton use the oldest assembler of a chip."""
    from triton import knobs

    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell = oldest_assembler(sm).path
        yield


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
