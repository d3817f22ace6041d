"""The compiled kernels in the machine: right, without a fault, and a missing barrier is noticed."""

from __future__ import annotations

import pytest

from fna.chebyshev import usual_steps
from fna.plugins.launch_plan import all_variants
from fna.plugins.ptx.calls import Chip
from fna.plugins.ptx.cases import AttentionCase, Case, SamplingCase, judge, quick_cases
from fna.plugins.ptx.check import body_digest, unmodelled_kernels
from fna.plugins.ptx.images import PtxImages
from fna.plugins.ptx.mutations import mutate, synchronisations, without
from fna.plugins.ptx.reports import Fault

CASES = list(quick_cases())


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_a_call_is_right_and_without_a_fault(images: PtxImages, case: Case) -> None:
    outcome = judge(case, Chip(images))
    assert not outcome.faults
    assert outcome.complete
    assert outcome.error <= outcome.tolerance


def test_the_quick_cases_run_every_kernel_and_type() -> None:
    every = {(v.kernel, v.dtype) for v in all_variants() if v.landmarks or v.kernel.startswith("focal")}
    named = [name.split("-") for case in CASES for name in case.variants]
    assert every <= {(kernel, dtype) for kernel, dtype, *_ in named}
    assert {kernel for kernel, *_ in named} == {variant.kernel for variant in all_variants()}
    assert {part for name in named for part in name} >= {"s64", "s128", "s256"}


def test_every_compiled_kernel_of_the_quick_cases_is_modelled(images: PtxImages) -> None:
    assert not unmodelled_kernels(images, [80, 0])


def test_a_missing_barrier_or_wait_is_noticed(images: PtxImages) -> None:
    """A sample; all of them: python -m fna.plugins.ptx barriers. The output kernel's last two stand in for one another."""
    found = list(mutate([AttentionCase("fp16", 64, 64, 131)], Chip(images), step=13, first=5))
    inner = [mutation for mutation in found if not mutation.variant.startswith("output")]
    assert len(inner) >= 5
    assert [str(mutation) for mutation in inner if not mutation.noticed] == []


def test_the_output_kernels_last_barriers_are_missed_only_together(images: PtxImages) -> None:
    """Either orders the rows of the output before the landmarks' rows that are written over them."""
    image = images.image("output-fp16-s128-d64", 0)
    last = synchronisations(image)[-2:]
    case = AttentionCase("fp16", 128, 64, 131, chebyshev=usual_steps(128))
    for removed, faults in ((last[:1], set()), (last[1:], set()), (last, {Fault.GLOBAL_WRITE_AFTER_WRITE})):
        call = case.run(Chip(images.with_kernel(image, without(image, removed))))
        assert {report.kind for report in call.memory.reports.faults} == faults


def test_a_missing_barrier_of_a_sampler_is_a_race(images: PtxImages) -> None:
    found = list(mutate([SamplingCase("fps", "fp32", 261, 48, 4)], Chip(images)))
    assert Fault.SHARED_READ_AFTER_WRITE in {mutation.fault for mutation in found}
    assert all(mutation.noticed for mutation in found)


def test_ptx_that_differs_in_its_header_only_is_one() -> None:
    first, second = (f".version 8.{v}\n.target sm_8{v}\n.entry k()" for v in (0, 6))
    assert body_digest(first) == body_digest(second)
    assert body_digest(first) != body_digest(first + "x")
