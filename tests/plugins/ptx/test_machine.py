"""The machine on PTX written by hand: known results, and each class of fault seen and named."""

from __future__ import annotations

import numpy as np
import pytest

from fna.errors import CheckFailedError, InputFileError, InvalidArgumentError
from fna.plugins.ptx import Fault, GlobalMemory, Kernel, UnmodelledInstructionError
from fna.plugins.ptx.reports import Note

SHARED_BYTES = 1024


def make_kernel(body: str, *, threads: int = 64, parameters: str = "u64 u64 u32", profile: bool = False) -> Kernel:
    """A kernel whose body starts with its thread in %r1, CTA in %r2 and parameters in %rd1, %rd2 and %r3."""
    kinds = ", ".join(f".param .{kind} k_param_{i}" for i, kind in enumerate(parameters.split()))
    text = f"""
.version 8.0
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({kinds})
.reqntid {threads}
{{
 .reg .b32 %r<99>;
 mov.u32 %r1, %tid.x;
 mov.u32 %r2, %ctaid.x;
 ld.param.u64 %rd1, [k_param_0];
 ld.param.u64 %rd2, [k_param_1];
 ld.param.u32 %r3, [k_param_2];
 mul.wide.u32 %rd3, %r1, 4;
 add.s64 %rd4, %rd1, %rd3;
 add.s64 %rd5, %rd2, %rd3;
 shl.b32 %r4, %r1, 2;
{body}
 ret;
}}
"""
    return Kernel(text, SHARED_BYTES, profile=profile)


def run(
    body: str, *, ctas: int = 1, number: int = 0, source: np.ndarray | None = None, threads: int = 64, shuffle: int = 0
) -> tuple[np.ndarray, GlobalMemory]:
    """Run with a source of 64 numbers at %rd1 and an output of 64 at %rd2; returns the output as uint32."""
    memory = GlobalMemory(1 << 16)
    if shuffle:
        memory.shuffle = np.random.default_rng(shuffle)
    source = np.arange(64, dtype=np.uint32) if source is None else source
    addresses = [memory.allocate("source", source, writable=False), memory.allocate("out", 64 * 4)]
    make_kernel(body, threads=threads).launch(memory, (ctas, 1, 1), [*addresses, number])
    return memory.bytes_at(addresses[1], 256).view(np.uint32).copy(), memory


def faults(memory: GlobalMemory) -> set[Fault]:
    return {report.kind for report in memory.reports.faults}


COPY = " ld.global.b32 %r10, [%rd4];\n st.global.b32 [%rd5], %r10;"
STAGE = " ld.global.b32 %r10, [%rd4];\n st.shared.b32 [%r4], %r10;"
NEIGHBOUR = " xor.b32 %r5, %r4, 128;\n ld.shared.b32 %r11, [%r5];\n st.global.b32 [%rd5], %r11;"


def test_a_copy_copies_and_has_no_fault() -> None:
    out, memory = run(COPY)
    assert out.tolist() == list(range(64))
    assert not list(memory.reports)


def test_an_exchange_through_shared_memory_with_a_barrier_is_clean() -> None:
    out, memory = run(f"{STAGE}\n bar.sync 0;\n{NEIGHBOUR}")
    assert out.tolist() == [*range(32, 64), *range(32)]
    assert not memory.reports.faults


def test_without_the_barrier_it_is_a_race_within_the_cta() -> None:
    _, memory = run(f"{STAGE}\n{NEIGHBOUR}")
    (report,) = memory.reports.faults
    assert report.kind is Fault.SHARED_READ_AFTER_WRITE
    assert "ld.shared.b32 %r11, [%r5]" in report.instruction
    assert "st.shared.b32 [%r4], %r10" in report.other
    assert report.count == 64


def test_an_exchange_within_a_warp_is_a_note_only() -> None:
    _, memory = run(f"{STAGE}\n xor.b32 %r5, %r4, 64;\n ld.shared.b32 %r11, [%r5];")
    assert not memory.reports.faults
    assert {report.kind for report in memory.reports} == {Note.WITHIN_WARP}


def test_overwriting_what_another_warp_still_reads_is_a_race() -> None:
    again = " st.shared.b32 [%r4], %r11;"
    _, memory = run(f"{STAGE}\n bar.sync 0;\n{NEIGHBOUR}\n{again}")
    assert faults(memory) == {Fault.SHARED_WRITE_AFTER_READ}
    _, memory = run(f"{STAGE}\n bar.sync 0;\n{NEIGHBOUR}\n bar.sync 0;\n{again}")
    assert not memory.reports.faults


def test_a_reader_before_the_last_is_remembered() -> None:
    """Both warps read the place, the second one last; its own write afterwards races with the first."""
    body = f"""{STAGE}
 bar.sync 0;
 mov.b32 %r5, 0;
 ld.shared.b32 %r11, [%r5];
 setp.eq.b32 %p1, %r1, 63;
 @%p1 st.shared.b32 [%r5], %r10;"""
    _, memory = run(body)
    assert faults(memory) == {Fault.SHARED_WRITE_AFTER_READ}


def test_two_warps_that_write_different_values_to_one_place_race() -> None:
    body = " and.b32 %r5, %r4, 127;\n st.shared.b32 [%r5], %r1;"
    _, memory = run(body)
    assert faults(memory) == {Fault.SHARED_TWO_VALUES}
    body = """ and.b32 %r5, %r4, 127;
 setp.lt.u32 %p1, %r1, 32;
 @%p1 st.shared.b32 [%r5], %r1;
 @!%p1 st.shared.b32 [%r5], %r1;"""
    _, memory = run(body)
    assert faults(memory) == {Fault.SHARED_WRITE_AFTER_WRITE}


def test_one_value_to_one_place_is_a_note_only() -> None:
    _, memory = run(" mov.b32 %r5, 0;\n mov.b32 %r6, 7;\n st.shared.b32 [%r5], %r6;\n st.global.b32 [%rd2], %r6;")
    assert not memory.reports.faults
    assert {report.kind for report in memory.reports} == {Note.SAME_VALUE}


def test_two_values_that_one_instruction_stores_to_one_global_address() -> None:
    _, memory = run(" st.global.b32 [%rd2], %r1;")
    assert faults(memory) == {Fault.GLOBAL_TWO_VALUES}


def test_which_lane_wins_is_open() -> None:
    winners = {int(run(" st.global.b32 [%rd2], %r1;", shuffle=seed)[0][0]) for seed in range(1, 9)}
    assert len(winners) > 1


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (" ld.global.b32 %r10, [%rd4+4];", Fault.GLOBAL_BOUNDS),
        (" ld.global.b32 %r10, [%rd4+-4];", Fault.GLOBAL_BOUNDS),
        (" st.global.b32 [%rd5+4], %r1;", Fault.GLOBAL_BOUNDS),
        (" ld.global.b32 %r10, [%rd4+2];", Fault.GLOBAL_MISALIGNED),
        (" ld.global.v2.b32 {%r10, %r11}, [%rd1+4];", Fault.GLOBAL_MISALIGNED),
        (" ld.global.b32 %r10, [%rd5];", Fault.GLOBAL_UNINITIALISED),
        (" st.global.b32 [%rd4], %r1;", Fault.GLOBAL_READ_ONLY),
        (" st.shared.b32 [%r4+1020], %r1;", Fault.SHARED_BOUNDS),
        (" st.shared.b32 [%r4+2], %r1;", Fault.SHARED_BOUNDS),
        (" ld.shared.b32 %r10, [%r4];", Fault.SHARED_UNINITIALISED),
    ],
)
def test_a_bad_access_is_named(body: str, fault: Fault) -> None:
    _, memory = run(body)
    assert faults(memory) == {fault}


def test_out_of_bounds_names_the_tensor_and_the_thread() -> None:
    _, memory = run(" ld.global.b32 %r10, [%rd4+4];")
    (report,) = memory.reports.faults
    assert report.example == "source+256 of 256, 4 bytes, CTA 0 warp 1 thread 63"
    assert report.count == 1


def test_races_between_ctas_are_seen_in_every_order() -> None:
    """CTA 0 writes, CTA 1 reads; then the other way round; then both write."""
    first_writes = """ setp.eq.b32 %p1, %r2, 0;
 @%p1 st.global.b32 [%rd5], %r1;
 setp.ne.b32 %p2, %r2, 0;
 @%p2 ld.global.b32 %r10, [%rd5];"""
    assert faults(run(first_writes, ctas=2)[1]) == {Fault.CTAS_READ_AFTER_WRITE}
    own = " st.global.b32 [%rd5], %r2;"
    assert Fault.GLOBAL_TWO_VALUES in faults(run(own, ctas=2)[1])
    second_writes = """ setp.eq.b32 %p1, %r2, 0;
 @%p1 ld.global.b32 %r10, [%rd5];
 setp.ne.b32 %p2, %r2, 0;
 @%p2 st.global.b32 [%rd5], %r1;"""
    assert Fault.CTAS_WRITE_AFTER_READ in faults(run(second_writes, ctas=2)[1])


def test_ctas_that_run_one_after_the_other_race_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr("fna.plugins.ptx.kernel.LANES_AT_ONCE", 64)
    assert faults(run(" st.global.b32 [%rd5], %r2;", ctas=2)[1]) == {Fault.CTAS_WRITE_AFTER_WRITE}


def test_a_barrier_does_not_order_global_memory_between_ctas_but_within_one() -> None:
    exchange = """ st.global.b32 [%rd5], %r1;
 {barrier}
 xor.b32 %r6, %r4, 128;
 cvt.u64.u32 %rd6, %r6;
 add.s64 %rd7, %rd2, %rd6;
 ld.global.b32 %r10, [%rd7];"""
    assert faults(run(exchange.format(barrier=""))[1]) == {Fault.GLOBAL_READ_AFTER_WRITE}
    assert not faults(run(exchange.format(barrier="bar.sync 0;"))[1])


COPY_ASYNC = " cp.async.ca.shared.global [%r4], [%rd4], 4;\n cp.async.commit_group;"
READ_BACK = " ld.shared.b32 %r11, [%r4];\n st.global.b32 [%rd5], %r11;"


def test_an_asynchronous_copy_is_poison_until_it_is_waited_for() -> None:
    _, memory = run(f"{COPY_ASYNC}\n{READ_BACK}")
    assert faults(memory) == {Fault.COPY_READ_IN_FLIGHT, Fault.SHARED_UNINITIALISED}
    out, memory = run(f"{COPY_ASYNC}\n cp.async.wait_group 0;\n{READ_BACK}")
    assert out.tolist() == list(range(64))
    assert not memory.reports.faults


def test_waiting_alone_shows_a_copy_to_no_other_warp() -> None:
    waited = f"{COPY_ASYNC}\n cp.async.wait_group 0;"
    assert faults(run(f"{waited}\n{NEIGHBOUR}")[1]) == {Fault.SHARED_READ_AFTER_WRITE}
    out, memory = run(f"{waited}\n bar.sync 0;\n{NEIGHBOUR}")
    assert not memory.reports.faults
    assert out.tolist() == [*range(32, 64), *range(32)]


def test_a_group_that_may_stay_in_flight_is_not_to_be_read() -> None:
    second = COPY_ASYNC.replace("[%r4]", "[%r4+256]")
    body = f"{COPY_ASYNC}\n{second}\n cp.async.wait_group 1;\n ld.shared.b32 %r11, [%r4+256];"
    assert Fault.COPY_READ_IN_FLIGHT in faults(run(body)[1])
    assert not faults(run(f"{COPY_ASYNC}\n{second}\n cp.async.wait_group 1;\n{READ_BACK}")[1])


def test_a_store_over_a_copy_in_flight_is_seen() -> None:
    assert Fault.COPY_OVERWRITTEN_IN_FLIGHT in faults(run(f"{COPY_ASYNC}\n st.shared.b32 [%r4], %r1;")[1])


def test_a_short_copy_fills_up_with_zeros() -> None:
    body = f""" mov.b32 %r7, 0;
 cp.async.ca.shared.global [%r4], [%rd4], 4, %r7;
 cp.async.wait_all;
{READ_BACK}"""
    out, memory = run(body)
    assert out.tolist() == [0] * 64
    assert not memory.reports.faults


def test_ctas_may_take_different_ways() -> None:
    body = """ setp.eq.b32 %p1, %r2, 1;
 @%p1 bra $second;
 bra $end;
$second:
 st.global.b32 [%rd5], %r1;
$end:"""
    out, memory = run(body, ctas=3)
    assert out.tolist() == list(range(64))
    assert not memory.reports.faults


def test_a_branch_that_divides_a_cta_is_refused() -> None:
    with pytest.raises(CheckFailedError, match="a branch divides CTA 0: 32 of its 64 threads"):
        run(" setp.lt.u32 %p1, %r1, 32;\n @%p1 bra $end;\n$end:")


def test_matrix_instructions_multiply() -> None:
    """ldmatrix and mma of one warp on ones and twos: each of 16 products is 2."""
    halves = np.full(128, 1.0, np.float16)
    halves[64:] = 2.0
    body = """ ld.global.b32 %r10, [%rd4];
 st.shared.b32 [%r4], %r10;
 ld.global.b32 %r10, [%rd4+128];
 st.shared.b32 [%r4+128], %r10;
 bar.sync 0;
 and.b32 %r5, %r1, 7;
 shl.b32 %r5, %r5, 4;
 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r11}, [%r5];
 ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r12}, [%r5+128];
 mov.b32 %r13, 0f3F800000;
 mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
   {%r20, %r21, %r22, %r23}, {%r11, %r11, %r11, %r11}, {%r12, %r12}, {%r13, %r13, %r13, %r13};
 st.global.b32 [%rd5], %r20;"""
    out, memory = run(body, source=halves.view(np.uint32), threads=32)
    assert out[:32].view(np.float32).tolist() == [33.0] * 32
    assert not memory.reports.faults


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        ("add.s32 %r10, %r1, -3", lambda t: t - 3),
        ("mad.lo.s32 %r10, %r1, 5, %r1", lambda t: t * 5 + t),
        ("shr.s32 %r10, %r1, 1", lambda t: t >> 1),
        ("bfe.u32 %r10, %r1, 2, 3", lambda t: (t >> 2) & 7),
        ("lop3.b32 %r10, %r1, %r4, 15, 0x6a", lambda t: (t & (t << 2)) ^ 15),
        ("prmt.b32 %r10, %r1, 258, 0x5410", lambda t: t | 258 << 16),
        ("popc.b32 %r10, %r1", lambda t: sum(t >> bit & 1 for bit in range(7))),
        ("shfl.sync.bfly.b32 %r10, %r1, 5, 31, -1", lambda t: t ^ 5),
        ("shfl.sync.up.b32 %r10, %r1, 3, 0, -1", lambda t: np.where(t % 32 < 3, t, t - 3)),
        ("redux.sync.max.u32 %r10, %r1, -1", lambda t: t | 31),
        ("mov.b32 %r9, 0fBF800000;\n redux.sync.max.f32 %r10, %r9, -1", lambda t: 0 * t + 0xBF800000),
        ("rem.u32 %r10, %r1, 7", lambda t: t % 7),
        ("cvt.rn.f32.s32 %r10, %r1", lambda t: t.astype(np.float32).view(np.uint32)),
        ("selp.b32 %r10, %r1, 9, %p1", lambda t: np.where(t < 8, t, 9)),
        ("cvt.rn.bf16x2.f32 %r10, 0f3F800000, 0f40000000", lambda t: 0 * t + 0x3F804000),
    ],
)
def test_arithmetic(operation: str, wanted) -> None:
    out, _ = run(f" setp.lt.u32 %p1, %r1, 8;\n {operation};\n st.global.b32 [%rd5], %r10;")
    assert np.array_equal(out, wanted(np.arange(64)).astype(np.int64) & 0xFFFFFFFF)


def test_an_unknown_instruction_is_named_with_its_line() -> None:
    with pytest.raises(UnmodelledInstructionError, match=r"line 18, tcgen05\.fence"):
        make_kernel(" tcgen05.fence::before_thread_sync;")


def test_arguments_have_to_fit_the_parameters() -> None:
    memory = GlobalMemory(1 << 16)
    with pytest.raises(InvalidArgumentError, match="argument 2 of k is 0.5, but .u32 is needed"):
        make_kernel("").launch(memory, (1, 1, 1), [0, 0, 0.5])
    with pytest.raises(InvalidArgumentError, match="takes 3 arguments, but 4"):
        make_kernel("").launch(memory, (1, 1, 1), [0, 0, 0, 0])


def test_what_is_no_ptx_is_refused() -> None:
    with pytest.raises(InputFileError, match="not PTX"):
        Kernel("hello", 0)


def test_a_profile_counts_instructions_wavefronts_and_sectors() -> None:
    """A stride of 32 words puts all lanes in one bank: 32 wavefronts where one would do. A copy moves 4 sectors a warp."""
    memory = GlobalMemory(1 << 16)
    addresses = [memory.allocate("source", 256), memory.allocate("out", 256)]
    kernel = make_kernel(
        " shl.b32 %r5, %r1, 5;\n st.shared.b32 [%r5], %r1;\n st.global.b32 [%rd5], %r1;", threads=32, profile=True
    )
    profile = kernel.launch(memory, (3, 1, 1), [*addresses, 0])
    (shared,), (sectors,) = profile.shared.values(), profile.sectors.values()
    assert (shared.count, shared.moved, shared.ideal) == (3, 3 * 8, 3)
    assert (sectors.count, sectors.moved, sectors.ideal) == (3, 12, 12)
    classes = kernel.instructions_by_class(profile)
    assert (classes["st.shared"], classes["st.global"], classes["branch"]) == (3, 3, 3)


def test_a_request_in_which_no_lane_takes_part_moves_nothing() -> None:
    """Of 8 turns the last 7 store nothing: one request of four sectors and seven of none."""
    memory = GlobalMemory(1 << 16)
    addresses = [memory.allocate("source", 256), memory.allocate("out", 256)]
    kernel = make_kernel(
        " mov.b32 %r5, 0;\nturn:\n setp.eq.u32 %p1, %r5, 0;\n @%p1 st.global.b32 [%rd5], %r1;\n add.s32 %r5, %r5, 1;\n"
        " setp.lt.u32 %p2, %r5, 8;\n @%p2 bra turn;",
        threads=32,
        profile=True,
    )
    (sectors,) = kernel.launch(memory, (1, 1, 1), [*addresses, 0]).sectors.values()
    assert (sectors.count, sectors.moved) == (8, 4)
