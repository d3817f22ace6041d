"""`fna bench --count`: FNA's launches beside exact attention's, on a device that is not here."""

from __future__ import annotations

import pytest

from fna.cli import main
from fna.engines.targets import find_target
from fna.validate.bench.cycles import CountedBench, usual_cores


@pytest.fixture(scope="module")
def counted(tiny_files, tmp_path_factory: pytest.TempPathFactory) -> CountedBench:
    """The command on a small model: its record."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from shared_build import cache_with_kernels

    record = tmp_path_factory.mktemp("counted") / "counted.json"
    arguments = ["bench", "validate_tiny:tiny", "--count", "--target", "jetson-agx-orin", "--landmarks", "12"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FNA_CACHE", str(cache_with_kernels()))
        patch.chdir(tiny_files.folder)
        assert main([*arguments, "--resolution", "112", "--json", str(record)]) == 0
    return CountedBench.model_validate_json(record.read_text())


def test_every_launch_is_counted_beside_exact_attention(counted: CountedBench) -> None:
    (size,) = counted.sizes
    assert (size.tokens, size.heads, size.head_size) == (65, 2, 16)
    (call,) = size.fna
    assert [launch.name for launch in call.launches] == [
        "landmark-fp16-s64-d64",
        "finish-fp16-s64",
        "output-fp16-s64-d64",
    ]
    assert [launch.name for launch in size.exact.launches] == ["exact"]
    assert call.cycles == sum(launch.cycles for launch in call.launches)
    assert call.over_exact == call.cycles / size.exact.cycles
    for launch in (*call.launches, *size.exact.launches):
        assert launch.wavefronts >= launch.ideal_wavefronts > 0
        assert launch.serial_cycles > launch.cycles > launch.tensor_cycles > 0
        assert launch.instructions["mma"] > 0


def test_a_time_is_the_cycles_at_the_targets_clock(counted: CountedBench) -> None:
    orin = find_target("jetson-agx-orin")
    assert (counted.target, counted.multiprocessors, counted.chip) == ("jetson-agx-orin", 16, "sm_87")
    exact = counted.sizes[0].exact
    assert exact.microseconds == pytest.approx(exact.cycles / 1.3e9 * 1e6, rel=0.01)
    assert counted.clock_ghz == orin.clock_ghz


def test_it_is_named_as_counted(counted: CountedBench) -> None:
    assert "not timed" in counted.counted


@pytest.mark.parametrize(
    ("target", "clock", "multiply_adds"), [("jetson-agx-orin", 1.3, 1024), ("a100", 1.41, 1024), ("l4", 2.04, 512)]
)
def test_a_targets_rates_give_its_clock_and_its_tensor_cores(target: str, clock: float, multiply_adds: float) -> None:
    found = find_target(target)
    assert found.clock_ghz == pytest.approx(clock, rel=0.01)
    assert found.multiply_adds_a_cycle == pytest.approx(multiply_adds, rel=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--count"], "--count and --target go together"),
        (["--target", "l4"], "--count and --target go together"),
        (["--count", "--target", "l4", "--csv", "a.csv"], "leave out --csv"),
        (["--count", "--target", "toaster"], "target 'toaster' is not known"),
        (["--count", "--target", "t4"], "no kernels to count"),
        (["--count", "--target", "l4", "--landmarks", "66"], "66 landmarks were given for 65 tokens"),
    ],
)
def test_what_cannot_be_counted_is_said_in_one_line(
    tiny, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "validate_tiny:tiny", "--resolution", "112", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_cheaper_core_is_counted_where_it_may_pay() -> None:
    assert usual_cores(64) == (None,)
    assert [core and core.steps for core in usual_cores(128)] == [8, None]
