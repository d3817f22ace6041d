"""The table of devices."""

from __future__ import annotations

import pytest

from fna.engines.builder.options import BuildOptions, check_options
from fna.engines.targets import TARGET_NAMES, TARGETS, find_target, find_targets
from fna.errors import InvalidArgumentError
from fna.plugins.table.chips import CHIPS

ISSUE = """jetson-orin-nano jetson-orin-nx jetson-agx-orin jetson-thor rtx-turing rtx-ampere rtx-ada rtx-blackwell
    dgx-spark l4 t4 a100 h100 h200 b300"""


def test_the_table_has_every_device_that_was_asked_for() -> None:
    assert list(TARGET_NAMES) == [*ISSUE.split(), "all"]


def test_all_is_what_tensorrt_rtx_builds_for() -> None:
    capabilities = {capability for target in find_targets("all") for capability in target.capabilities}
    assert capabilities == {80, 86, 89, 120}


def test_several_targets_are_named_with_commas() -> None:
    assert [target.name for target in find_targets("rtx-ada, l4")] == ["rtx-ada", "l4"]


def test_agx_orin_keeps_the_command_line_on_jetpack_7() -> None:
    """JetPack 7.2 brings Python 3.12; JetPack 6 has 3.10, which is too old for it."""
    assert find_target("jetson-agx-orin").systems == {"JetPack 6": "10.3", "JetPack 7.2": "10.16"}


@pytest.mark.parametrize("name", ["jetson-orin-nano", "jetson-thor", "rtx-ada", "dgx-spark"])
def test_engines_for_other_chips_are_refused_on_a_jetson_by_name(name: str) -> None:
    """Before a GPU is looked for, so that a workstation says it as well."""
    options = BuildOptions(backend="tensorrt", targets=(find_target(name),), hardware_compatible=True)
    if not find_target(name).is_jetson:
        check_options(options)
        return
    with pytest.raises(InvalidArgumentError, match=f"--hardware-compatible was asked for.*{name}"):
        check_options(options)


def test_an_unknown_target_is_refused_with_the_list() -> None:
    with pytest.raises(InvalidArgumentError, match="voodoo.*rtx-ada"):
        find_targets("rtx-ada,voodoo")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_rates_and_lowerings_are_consistent(target) -> None:
    """Tensor cores are 2 to 32 times as fast as the rest; only chips that the kernels are compiled for get the plugin."""
    assert 1 < target.fp16_tflops / target.fp32_tflops <= 33
    assert target.fp32_tflops / target.multiprocessors < 1
    assert target.memory_gib >= 8
    assert target.bandwidth_gb_s > 60
    assert (target.lowering == "plugin") == (set(target.capabilities) <= set(CHIPS))
    assert ("bf16" in target.precisions) == (min(target.capabilities) >= 80)
    assert set(target.systems.values()) <= {"10.3", "10.13", "10.16"}
    assert target.is_jetson == target.name.startswith("jetson")
    assert find_target(target.name) is target
