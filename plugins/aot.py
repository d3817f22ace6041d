"""Compile every kernel variant for every GPU ahead of time, and write the table that the library and PyTorch load.

    python -m fna.plugins.aot --output build/plugin

Nothing here needs a GPU. Each (variant, chip) is compiled in a worker process, kept in a cache named by everything that
goes into it (kernel source, constants, options, Triton's version), and checked: a kernel that spills more than
`MAX_SPILL_BYTES` per thread or wants more shared memory than its chip has fails the build by name.

Output: `kernels.bin` (raw deflate streams, one after the other), `kernels.json` (what PyTorch reads) and `kernel_table.inc` (what
is compiled into the library; fields as in `plugins/src/kernel_table.hpp`). Beside them, for `fna.plugins.ptx` and not shipped:
`ptx/`, the PTX that the assembler turned into each chip's image, and `ptx.json`, which gives the image's SHA-256 with each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from fna.errors import BuildError, CheckFailedError, FnaError, InvalidArgumentError, MissingCapabilityError
from fna.plugins.launch_plan import Variant, all_variants

CHIPS = (80, 86, 87, 89, 90, 100, 110, 120)
FALLBACK = 0
"""The table's name for sm_80 PTX, which the driver compiles for any chip that the table does not list."""

FALLBACK_TARGET = 80

FALLBACK_PTX_VERSION = 80
"""PTX ISA 8.0, which drivers of CUDA 12.0 and later read; Triton would write its own compiler's newest."""

MAX_SPILL_BYTES = 64
"""Largest stack frame per thread. Kernels here have no arrays, so a stack frame is spilled registers."""

KIB = 1024
SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 110: 227, 120: 99, FALLBACK: 99}
"""Shared memory per block in KiB (CUDA C++ Programming Guide, technical specifications per compute capability; 11.0 is taken
to be as 10.0). The fallback has to fit the smallest."""


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

    @property
    def chip(self) -> str:
        """For messages."""
        return "sm_80 PTX" if self.sm == FALLBACK else f"sm_{self.sm}"


def build_table(
    output: Path,
    *,
    chips: Sequence[int] = (*CHIPS, FALLBACK),
    variants: Iterable[Variant] | None = None,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> list[Compiled]:
    """Compile and check the variants (all by default), write the table into `output`, and return its entries.

    Raises:
        MissingCapabilityError: Triton is not installed.
        CheckFailedError: a kernel spills or wants too much shared memory; names kernel and chip.
        BuildError: a compiler failed; names kernel and chip.
    """
    unknown = sorted(set(chips) - set(SHARED_LIMIT))
    if unknown:
        raise InvalidArgumentError(
            f"sm_{unknown[0]} is not a target; choose from {', '.join(map(str, CHIPS))} and 0 for PTX"
        )
    targets = sorted({FALLBACK_TARGET if sm == FALLBACK else sm for sm in chips})
    tasks = [(v, target) for v in (all_variants() if variants is None else variants) for target in targets]
    cache = cache or output / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    found = _compile_all(tasks, cache, jobs or os.cpu_count() or 1, progress)
    compiled = [entry for entries in found for sm, entry in entries.items() if sm in chips]
    for entry in compiled:
        check_entry(entry)
    write_table(compiled, output)
    return compiled


def check_entry(entry: Compiled) -> None:
    """Refuse a kernel that spills or does not fit, naming kernel and chip."""
    if entry.stack > MAX_SPILL_BYTES:
        raise CheckFailedError(
            f"{entry.variant} on {entry.chip} spills {entry.stack} bytes per thread, but at most {MAX_SPILL_BYTES} are allowed; "
            "make its blocks smaller in plugins/plan.py or change its warps in plugins/kernels/registry.py"
        )
    limit = SHARED_LIMIT[entry.sm] * KIB
    used = entry.shared + entry.static_shared
    if used > limit:
        raise CheckFailedError(
            f"{entry.variant} on {entry.chip} needs {used} bytes of shared memory, but a block has {limit} there; "
            "use fewer stages in plugins/kernels/registry.py or smaller blocks in plugins/plan.py"
        )


def write_table(compiled: Sequence[Compiled], output: Path) -> None:
    """Write kernels.bin, kernels.json and kernel_table.inc, each under a temporary name first."""
    output.mkdir(parents=True, exist_ok=True)
    blob, rows, entries = bytearray(), [], []
    for entry in sorted(compiled, key=lambda e: (e.variant, e.sm)):
        raw = Path(entry.image).read_bytes()
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(raw) + packer.flush()
        place = {"offset": len(blob), "packed": len(packed), "size": len(raw)}
        fields = {"variant": entry.variant, "sm": entry.sm, **place, "shared": entry.shared, "warps": entry.warps}
        entries.append({**fields, "symbol": entry.symbol, "layout": entry.layout})
        numbers = ", ".join(str(v) for k, v in fields.items() if k != "variant")
        rows.append(f'{{"{entry.variant}", {numbers}, "{entry.symbol}", "{entry.layout}"}},\n')
        blob += packed
    _write_whole(output / "kernels.bin", bytes(blob))
    _write_whole(output / "kernel_table.inc", "".join(rows).encode())
    _write_whole(output / "kernels.json", json.dumps({"kernels": entries}, indent=1).encode())
    _write_ptx(compiled, output)


def _write_ptx(compiled: Sequence[Compiled], output: Path) -> None:
    """Write the PTX of every chip's image, compressed, and what a launch of it needs."""
    folder = output / "ptx"
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, str | int]] = []
    for entry in sorted((e for e in compiled if e.ptx), key=lambda e: (e.variant, e.sm)):
        name = f"{entry.variant}-sm{entry.sm}.ptx.z"
        _write_whole(folder / name, zlib.compress(Path(entry.ptx).read_bytes().rstrip(b"\0")))
        image = hashlib.sha256(Path(entry.image).read_bytes()).hexdigest()
        launch: dict[str, str | int] = {
            "symbol": entry.symbol,
            "shared": entry.shared,
            "warps": entry.warps,
            "layout": entry.layout,
        }
        rows.append({"variant": entry.variant, "sm": entry.sm, "file": f"ptx/{name}", "image_sha256": image, **launch})
    for stale in set(folder.glob("*.ptx.z")) - {output / str(row["file"]) for row in rows}:
        stale.unlink()
    _write_whole(output / "ptx.json", json.dumps({"kernels": rows}, indent=1).encode())


def compile_variant(variant: Variant, target: int, cache: Path) -> dict[int, Compiled]:
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
    constants, options = registry.constants(variant), dict(registry.options(variant), enable_fp_fusion=True)
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
    _write_whole(images[target], built.asm["cubin"])
    _write_whole(text, built.asm["ptx"].encode() + b"\0")
    entry = Compiled(
        variant=variant.name, sm=target, symbol=meta.name, shared=meta.shared, static_shared=usage["SHARED"],
        warps=meta.num_warps, registers=usage["REG"], stack=usage["STACK"],
        layout=registry.parameter_layout(variant), image=str(images[target]), ptx=str(text),
    )  # fmt: skip
    _write_whole(record, json.dumps(asdict(entry)).encode())
    return {sm: replace(entry, sm=sm, image=str(image)) for sm, image in images.items()}


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False)
    found = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", done.stdout + done.stderr))
    if len(found) != 3:
        raise BuildError(f"cuobjdump did not say what the kernel uses: {(done.stdout + done.stderr).strip()[:200]}")
    return {name: int(value) for name, value in found.items()}


def _compile_all(tasks: list[tuple[Variant, int]], cache: Path, jobs: int, progress: bool) -> list[dict[int, Compiled]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("compiling kernels"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, quiet=not progress)
    done: dict[tuple[Variant, int], dict[int, Compiled]] = {}
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(tasks))
        for key, entry in _in_pool(tasks, cache, jobs):
            done[key] = entry
            bar.advance(task)
    return [done[key] for key in tasks]


def _in_pool(
    tasks: list[tuple[Variant, int]], cache: Path, jobs: int
) -> Iterable[tuple[tuple[Variant, int], dict[int, Compiled]]]:
    """Yield results as they come. A worker that died is tried again alone, so that the kernel at fault can be named."""
    unsure = []
    with _pool(jobs, cache) as pool:
        futures: dict[Future[dict[int, Compiled]], tuple[Variant, int]] = {
            pool.submit(compile_variant, *t, cache): t for t in tasks
        }
        for future in as_completed(futures):
            try:
                yield futures[future], _result(future, *futures[future])
            except BrokenProcessPool:
                unsure.append(futures[future])
            except FnaError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    for variant, sm in unsure:
        with _pool(1, cache) as pool:
            try:
                yield (variant, sm), _result(pool.submit(compile_variant, variant, sm, cache), variant, sm)
            except BrokenProcessPool as error:
                raise BuildError(
                    f"the compiler died on {variant.name} for sm_{sm}; run it alone to see its output"
                ) from error


def _result(future: Future[dict[int, Compiled]], variant: Variant, sm: int) -> dict[int, Compiled]:
    try:
        return future.result()
    except (FnaError, BrokenProcessPool):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise BuildError(f"{variant.name} for sm_{sm} does not compile: {type(error).__name__}: {first}") from error


def _pool(jobs: int, cache: Path) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_prepare_worker, initargs=(str(cache),)
    )


def _prepare_worker(cache: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=cache, prefix="triton-")


def _write_whole(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return  # its time stays, so that libraries that hold it are not built again
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the ahead-of-time build; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fna.plugins.aot", description="Compile the kernels ahead of time.")
    parser.add_argument("--output", type=Path, default=Path("build/plugin"), help="folder of the table (build/plugin)")
    parser.add_argument("--sm", default=",".join(map(str, (*CHIPS, FALLBACK))), help="chips, such as 87,90; 0 is PTX")
    parser.add_argument("--only", default="", help="regular expression on the variants' names")
    parser.add_argument("--jobs", type=int, default=None, help="worker processes (one per core)")
    parser.add_argument("--list", action="store_true", help="print what each kernel uses")
    arguments = parser.parse_args(argv)
    try:
        chips = [int(sm) for sm in arguments.sm.split(",")]
        chosen = [v for v in all_variants() if re.search(arguments.only, v.name)]
        entries = build_table(arguments.output, chips=chips, variants=chosen, jobs=arguments.jobs, progress=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.list:
        for e in entries:
            print(
                f"{e.variant:28} {e.chip:10} {e.registers:4} registers {e.stack:4} stack {e.shared:7} shared {e.warps:3} warps"
            )
    size = (arguments.output / "kernels.bin").stat().st_size
    print(f"{len(entries)} kernels, {size / 2**20:.1f} MiB packed, in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
