"""Benches: what is counted, where curves meet, what is written, and what a machine that lacks something says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fna.arithmetic import exact_products, nystrom_products, saved_part
from fna.cli import main
from fna.correction import Correction
from fna.engines.device import find_gpu
from fna.export.passes import Lowering
from fna.export.sources.loading import load_model
from fna.plan import BlockPlan, FocalBlockPlan, Plan, uniform_plan
from fna.validate.bench import Backend
from fna.validate.bench.backends import OPENERS, forms_of
from fna.validate.bench.counts import count, total_flop
from fna.validate.bench.models import BenchRow, bench, bench_quickly, find_break_even, read_bench
from fna.validate.bench.output import draw, dump_csv
from fna.validate.bench.timing import OpenModel, Timing, time_in_turns


def test_a_models_count_is_its_linear_layers_and_its_attention(tiny) -> None:
    model = load_model("validate_tiny:tiny")
    tokens, width, blocks = 65, 32, 3
    linear = blocks * 2 * tokens * width * width * (4 + 8) + 2 * 64 * width * 3 * 14 * 14
    found = count(model, uniform_plan(3, layers="1-2", landmarks=12, prefix_tokens=1), 112, 112)
    exact = 2 * exact_products(tokens, 2, 16)
    assert total_flop(model, 112, 112) == linear + blocks * exact
    assert found.attention_share == pytest.approx(blocks * exact / total_flop(model, 112, 112))
    saved = 2 * (exact - 2 * nystrom_products(tokens, 12, 2, 16, 6))
    assert found.dense_gflop - found.fna_gflop == pytest.approx(saved / 1e9)


def test_a_plans_heads_iterations_and_corrections_count_as_the_planner_counts_them(tiny) -> None:
    model = load_model("validate_tiny:tiny")
    correction = Correction(size=3, kernels=((0.0,) * 9,), gains=(1.0,))
    entry = BlockPlan(block=1, landmarks=8, sampler="fps", heads=(1,), iterations=3, correction=correction)
    plan = Plan(num_blocks=3, blocks=(entry,), prefix_tokens=1)
    found = count(model, plan, 112, 112)
    assert 1 - found.fna_attention_gflop / found.dense_attention_gflop == pytest.approx(saved_part(plan, 65, 2, 16))
    whole = count(model, Plan(num_blocks=3, blocks=(BlockPlan(block=1, landmarks=8),), prefix_tokens=1), 112, 112)
    assert found.fna_attention_mib > whole.fna_attention_mib


def row(tokens: int, speedup: float, landmarks: int = 8) -> BenchRow:
    timings = [
        Timing(median=ms, fastest=ms, slowest=ms, runs=1, images_per_second=1e3 / ms) for ms in (10.0, 10.0 / speedup)
    ]
    return BenchRow(
        backend="torch", height=1, width=1, tokens=tokens, landmarks=landmarks, blocks=1, baseline="PyTorch",
        dense=timings[0], fna=timings[1], speedup=speedup,
    )  # fmt: skip


def test_the_break_even_lies_where_the_curves_meet_on_logarithmic_axes() -> None:
    # speed-up grows with the square root of the tokens, and is 1 at 400
    rows = [row(tokens, (tokens / 400) ** 0.5) for tokens in (100, 1600)]
    (found,) = find_break_even(rows)
    assert found.tokens == pytest.approx(400, abs=0.1)


def test_a_break_even_outside_of_what_was_measured_is_not_guessed() -> None:
    always, never = find_break_even([row(10, 1.5, 4), row(20, 2.0, 4), row(10, 0.4, 8), row(20, 0.5, 8)])
    assert (always.tokens, never.tokens) == (None, None)
    assert "faster already at 10 tokens" in always.reason
    assert "exact attention is faster up to 20 tokens" in never.reason


def test_rows_for_every_size_and_s_in_json_and_csv(tiny, tmp_path: Path) -> None:
    model = load_model("validate_tiny:tiny")
    plans = [uniform_plan(3, layers="1-2", landmarks=count) for count in (6, 8)]
    result = bench(model, plans, [(112, 112), (56, 28)], backend="torch", runs=2)
    assert [(item.height, item.width, item.tokens, item.landmarks) for item in result.rows] == [
        (56, 28, 9, 6), (56, 28, 9, 8), (112, 112, 65, 6), (112, 112, 65, 8),
    ]  # fmt: skip
    for item in result.rows:
        assert item.speedup == item.dense.median / item.fna.median
        assert item.dense.fastest <= item.dense.median <= item.dense.slowest
        assert item.dense.peak_mib is None or item.dense.peak_mib >= 0
    lines = list(csv.DictReader(dump_csv(result).splitlines()))
    assert [float(line["fna.median"]) for line in lines] == [item.fna.median for item in result.rows]
    assert float(lines[0]["counts.dense_gflop"]) == result.rows[0].counts.dense_gflop
    path = tmp_path / "bench.json"
    path.write_text(result.model_dump_json())
    assert read_bench(path) == json.loads(result.model_dump_json())
    for name in ("plot.png", "plot.svg"):
        draw(result, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000


def test_a_speed_up_is_against_the_fastest_form_of_exact_attention_and_names_it(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    milliseconds = iter([9.0, 7.0, 8.0, 4.0, 5.0, 3.5])  # exact in three forms, then the plan in three

    def timed(models: list[OpenModel], *_settings: int) -> list[Timing]:
        for model in models:
            model.run()
        medians = [next(milliseconds) for _ in models]
        return [Timing(median=ms, fastest=ms, slowest=ms, runs=1, images_per_second=1.0) for ms in medians]

    monkeypatch.setattr("fna.validate.bench.models.time_in_turns", timed)
    path = tmp_path / "bench.json"
    assert main(["bench", "validate_tiny:tiny", "--landmarks", "6", "--resolution", "56", "--json", str(path)]) == 0
    (found,) = read_bench(path)["rows"]
    assert list(found["exact_forms"]) == [
        "MatMul, Softmax, MatMul", "ONNX Attention", "com.microsoft MultiHeadAttention"
    ]  # fmt: skip
    assert (found["baseline"], found["dense"]["median"]) == ("ONNX Attention", 7.0)
    assert (found["fna_form"], found["fna"]["median"]) == ("com.microsoft MultiHeadAttention", 3.5)
    assert found["speedup"] == 2.0
    printed = " ".join(capsys.readouterr().out.split())
    assert "speed-up against ONNX Attention, the fastest form of exact attention here" in printed


def test_what_a_focal_plan_is_compared_with_is_exact_in_every_block(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def opener(_setting: object, plan: Plan, _form: object) -> OpenModel:
        plans.append(plan)
        return OpenModel(lambda: 1.0)

    monkeypatch.setitem(OPENERS, "torch", opener)
    focal = FocalBlockPlan(block=1, tile=2, levels=((1, 0), (2, 1)), hot=2, seed=0)
    plan = Plan(num_blocks=3, focal=(focal,), prefix_tokens=1)
    result = bench(load_model("validate_tiny:tiny"), [plan], [(112, 84)], backend="torch", runs=1)
    assert [seen.replaced_blocks for seen in plans] == [[], [1]]
    assert plans[1].patches == (8, 6)  # no square, so its tiles must be told
    assert (result.rows[0].landmarks, result.rows[0].blocks) == (0, 1)


def test_a_quick_bench_leaves_out_sizes_that_a_focal_plan_does_not_fit(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPENERS, "torch", lambda *_: OpenModel(lambda: 1.0))
    for settings, tokens in (({"hot": 30}, [37, 65]), ({"tile": 7}, [65]), ({}, [10, 37, 65])):
        focal = FocalBlockPlan.model_validate({"block": 1, "tile": 2, "levels": ((1, 0), (2, 1)), "hot": 2} | settings)
        plan = Plan(num_blocks=3, focal=(focal,), prefix_tokens=1)
        found = bench_quickly(load_model("validate_tiny:tiny"), plan, (112, 112), lambda *_: None)
        assert [row["tokens"] for row in found["rows"]] == tokens


@pytest.mark.parametrize(
    ("backend", "own"), [("onnxruntime", "onnxruntime-kernels"), ("onnxruntime-cuda", "onnxruntime")]
)
def test_a_processor_is_timed_in_the_form_that_it_is_given(backend: Backend, own: Lowering, tiny) -> None:
    forms = forms_of(backend, load_model("validate_tiny:tiny"))
    assert [form.lowering for form in forms] == ["portable", "fused", own]


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "tensorrt", "tensorrt-rtx"])
def test_a_backend_that_is_not_here_is_exit_code_3(capsys: pytest.CaptureFixture[str], backend: str) -> None:
    assert main(["bench", "dinov2-small-saliency", "--backend", backend]) == 3
    error = capsys.readouterr().err
    assert f"--backend {backend} needs an NVIDIA GPU, but the CUDA driver" in error
    assert error.count("\n") == 1


def test_another_json_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny) -> None:
    (tmp_path / "other.json").write_text("{}")
    code = main(
        ["validate", str(tiny.file("fp32")), "--bench", str(tmp_path / "other.json"), "--output", str(tmp_path)]
    )
    assert code == 2
    assert "is no JSON file of this version's fna bench" in capsys.readouterr().err


def test_models_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    def model(name: str, seconds: float) -> OpenModel:
        return OpenModel(
            lambda: (order.append(name), seconds)[1], details=lambda: {"runs seen": float(order.count(name))}
        )

    slow, fast = time_in_turns([model("slow", 0.4), model("fast", 0.1)], runs=3, warm_up=1, batch=2)
    assert order == ["slow", "fast"] * 4
    assert (slow.median, slow.runs, slow.images_per_second) == (400, 3, 5)
    assert (fast.median, fast.details) == (100, {"runs seen": 4.0})
