"""The load test's verdicts; a real server is in serving/test_triton_server.py."""

from __future__ import annotations

import numpy as np
import pytest

from fna.engines.load_test import Sample, Tally, agree, agree_as_bundled, hold
from fna.engines.serving.client import RefusedError, TritonClient
from fna.errors import CheckFailedError
from fna.export.metadata import FileMetadata
from fna.plan import uniform_plan


@pytest.mark.parametrize(
    ("tally", "said"),
    [
        (Tally(), "no request was answered"),
        (Tally([0.1], failed=["Timeout: 60 s"]), "1 requests were lost; the first: Timeout"),
        (Tally([0.1], wrong=2), "2 answers were not those of the client's photograph"),
        (Tally([0.1], accepted=["empty"]), "the bad request 'empty' was answered"),
        (Tally([0.1], told=3), "1 of 4 clients were not told"),
    ],
)
def test_what_went_wrong_is_named(tally: Tally, said: str) -> None:
    Tally([0.1], told=4).check(4)
    with pytest.raises(CheckFailedError, match=said):
        tally.check(4)


def test_an_answer_is_right_only_with_the_shape_and_the_values() -> None:
    expected = {"tokens": np.ones((1, 8), np.float32)}
    assert agree({"tokens": expected["tokens"] * 1.001}, expected)
    assert not agree({"tokens": expected["tokens"] * 1.01}, expected)
    assert not agree({"tokens": expected["tokens"][:, :4]}, expected)
    assert not agree({}, expected)


def test_a_server_with_an_engine_is_held_to_a_bundles_tolerances() -> None:
    plan = uniform_plan(2, layers="all", landmarks=6)
    file = FileMetadata(plan=plan, source="x", origin="trace", token_outputs=("tokens",))
    expected = {"tokens": np.random.default_rng(0).standard_normal((1, 40, 64)).astype(np.float32)}
    noise = np.random.default_rng(1).standard_normal((1, 40, 64)).astype(np.float32)
    near = {"tokens": expected["tokens"] + 0.03 * noise}  # cosine 0.9996
    int8 = agree_as_bundled(file.model_copy(update={"quantized": "int8"}))
    assert int8(near, expected)
    assert not agree_as_bundled(file)(near, expected)
    assert not int8({"tokens": expected["tokens"] + 0.3 * noise}, expected)
    assert not int8({}, expected)
    scores = {"logits": np.array([[0, 1, 5]], np.float32)}
    assert int8({"logits": scores["logits"] * 2}, scores)  # the same class
    assert not int8({"logits": scores["logits"][:, ::-1]}, scores)


class Crossed(TritonClient):
    """A server that gives everyone the first client's answer, and takes anything."""

    def __init__(self) -> None:
        pass

    def infer(self, model: str, array: np.ndarray, name: str = "raw_image") -> dict[str, np.ndarray]:
        return {"tokens": np.zeros(2, np.float32)}


class Refusing(Crossed):
    def infer(self, model: str, array: np.ndarray, name: str = "raw_image") -> dict[str, np.ndarray]:
        raise RefusedError(503, "busy")


def samples() -> list[Sample]:
    image = np.zeros((1, 8, 8, 3), np.uint8)
    return [Sample(image, {"tokens": np.full(2, value, np.float32)}) for value in (0, 1)]


def test_answers_of_other_clients_and_bad_requests_that_pass_are_counted() -> None:
    tally = hold(Crossed, "model", samples(), 0.1)
    assert tally.seconds
    assert 0 < tally.wrong < len(tally.seconds) + 2
    assert tally.accepted == ["type", "channels", "rank", "empty", "no columns", "no photograph", "batch"]


def test_refused_requests_of_good_clients_are_lost() -> None:
    tally = hold(Refusing, "model", samples(), 0.1)
    assert "RefusedError: busy" in tally.failed
    assert tally.refused["batch"] == "503: busy"
