"""Compile every kernel variant for every chip, in worker processes, and check what comes out.

A kernel that spills more than `MAX_SPILL_BYTES` per thread, wants more shared memory than its chip has, or was assembled by a CUDA
that some of the chip's drivers do not load fails the build by name.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from fna.errors import BuildError, CheckFailedError, FnaError, InvalidArgumentError
from fna.plugins.launch_plan import KernelVariant, all_variants
from fna.plugins.table.chips import (
    ALL_IMAGES,
    CHIPS,
    FALLBACK,
    chip_name,
    compiled_as,
    newest_toolkit,
    shared_limit,
)
from fna.plugins.table.compile import Compiled, compile_variant
from fna.plugins.table.write import write_table

Task = tuple[KernelVariant, tuple[int, ...]]
"""A variant, and chips that share its PTX."""

MAX_SPILL_BYTES = 64
"""Largest stack frame per thread. Kernels here have no arrays, so a stack frame is spilled registers."""


def build_table(
    output: Path,
    *,
    chips: Sequence[int] = ALL_IMAGES,
    variants: Iterable[KernelVariant] | None = None,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> list[Compiled]:
    """Compile and check the variants (all by default), write the table into `output`, and return its entries.

    Raises:
        MissingCapabilityError: Triton is not installed.
        CheckFailedError: a kernel spills, wants too much shared memory, or is too new; names kernel and chip.
        BuildError: a compiler failed; names kernel and chip.
    """
    unknown = sorted(set(chips) - set(ALL_IMAGES))
    if unknown:
        raise InvalidArgumentError(
            f"sm_{unknown[0]} is not a target; choose from {', '.join(map(str, CHIPS))} and 0 for PTX"
        )
    alike: dict[int, list[int]] = {}
    for sm in sorted(set(chips)):
        alike.setdefault(compiled_as(sm), []).append(sm)
    tasks = [
        (v, tuple(together)) for v in (all_variants() if variants is None else variants) for together in alike.values()
    ]
    cache = cache or output / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    images = _compile_all(tasks, cache, jobs or os.cpu_count() or 1, progress)
    compiled = [kernel for kernels in images for kernel in kernels.values()]
    for kernel in compiled:
        check_kernel(kernel)
    write_table(compiled, output)
    return compiled


def check_kernel(kernel: Compiled) -> None:
    """Refuse a kernel that spills, does not fit, or that older drivers would refuse; names kernel and chip."""
    newest = newest_toolkit(kernel.sm)
    if kernel.sm != FALLBACK and int(kernel.toolkit.split(".")[0]) > newest:
        raise CheckFailedError(
            f"{kernel.variant} on {chip_name(kernel.sm)} was assembled by CUDA {kernel.toolkit}, whose images "
            f"drivers of CUDA {newest} refuse; use a Triton that carries the ptxas of CUDA {newest}"
        )
    if kernel.stack > MAX_SPILL_BYTES:
        raise CheckFailedError(
            f"{kernel.variant} on {chip_name(kernel.sm)} spills {kernel.stack} bytes per thread, but at most {MAX_SPILL_BYTES} are "
            "allowed; make its blocks smaller in plugins/launch_plan.py or change its warps in plugins/kernels/registry.py"
        )
    limit = shared_limit(kernel.sm)
    used = kernel.shared + kernel.static_shared
    if used > limit:
        raise CheckFailedError(
            f"{kernel.variant} on {chip_name(kernel.sm)} needs {used} bytes of shared memory, but a block has {limit} there; "
            "use fewer stages in plugins/kernels/registry.py or smaller blocks in plugins/launch_plan.py"
        )


def _compile_all(tasks: list[Task], cache: Path, jobs: int, progress: bool) -> list[dict[int, Compiled]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("compiling kernels"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, quiet=not progress)
    done: dict[Task, dict[int, Compiled]] = {}
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(tasks))
        for key, kernel in _in_pool(tasks, cache, jobs):
            done[key] = kernel
            bar.advance(task)
    return [done[key] for key in tasks]


def _in_pool(tasks: list[Task], cache: Path, jobs: int) -> Iterable[tuple[Task, dict[int, Compiled]]]:
    """Yield results as they come. A worker that died is tried again alone, so that the kernel at fault can be named."""
    unsure = []
    with _pool(jobs, cache) as pool:
        futures: dict[Future[dict[int, Compiled]], Task] = {pool.submit(compile_variant, *t, cache): t for t in tasks}
        for future in as_completed(futures):
            try:
                yield futures[future], _result(future, *futures[future])
            except BrokenProcessPool:
                unsure.append(futures[future])
            except FnaError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    for variant, sms in unsure:
        with _pool(1, cache) as pool:
            try:
                yield (variant, sms), _result(pool.submit(compile_variant, variant, sms, cache), variant, sms)
            except BrokenProcessPool as error:
                raise BuildError(
                    f"the compiler died on {variant.name} for {_names(sms)}; run it alone to see its output"
                ) from error


def _names(sms: Sequence[int]) -> str:
    return ", ".join(map(chip_name, sms))


def _result(future: Future[dict[int, Compiled]], variant: KernelVariant, sms: Sequence[int]) -> dict[int, Compiled]:
    try:
        return future.result()
    except (FnaError, BrokenProcessPool):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise BuildError(
            f"{variant.name} for {_names(sms)} does not compile: {type(error).__name__}: {first}"
        ) from error


def _pool(jobs: int, cache: Path) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_prepare_worker, initargs=(str(cache),)
    )


def _prepare_worker(cache: str) -> None:
    # Triton's bindings keep some of Gluon's layouts to the end, and would list them on stderr there.
    atexit.register(os._exit, 0)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=cache, prefix="triton-")
