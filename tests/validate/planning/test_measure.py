"""Losses that are predicted from moments, against the same errors computed directly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fna.attention import fast_nystrom_attention
from fna.chebyshev import ChebyshevSteps
from fna.composition import correct
from fna.correction import Correction
from fna.export.sources.loading import LoadedModel
from fna.focal import focal_attention
from fna.observing import AttentionCall, observed
from fna.samplers import landmark_bias, select_landmarks
from fna.validate.planning import measure_focal as measure_focal_module
from fna.validate.planning import subject as subjects
from fna.validate.planning.candidates import Candidate, FocalCandidate
from fna.validate.planning.measure import SharedFeatures, fit_correction, measure_block
from fna.validate.planning.measure_focal import measure_focal
from fna.validate.planning.subject import BlockView, TorchSubject


@pytest.fixture(scope="module")
def subject(planned_model: LoadedModel) -> TorchSubject:
    return TorchSubject(planned_model, 112, 112)


@pytest.fixture(scope="module")
def views(subject: TorchSubject, pictures: list[NDArray[np.float32]]) -> list[BlockView]:
    found: list[BlockView] = []
    subject.look(pictures[0], found.append)
    return found


def error_of(view: BlockView, candidate: Candidate, correction: Correction | None) -> Tensor:  # [H, N, D]
    landmarks = select_landmarks(view.hidden, candidate.landmarks, method=candidate.sampler)  # type: ignore[arg-type]
    bias = landmark_bias(view.query.shape[2], candidate.landmarks, method=candidate.sampler)
    out = fast_nystrom_attention(
        view.query, view.key, view.value, landmarks, landmark_bias=bias, scale=view.scale,
        iterations=candidate.iterations, exact_rows=True, chebyshev=candidate.chebyshev,
    )  # fmt: skip
    if correction is not None:
        out = correct(out, view.value, landmarks, correction, prefix_tokens=1, patches=(8, 8), exact_rows=True)
    return (out - view.exact)[0]


def direct_loss(view: BlockView, error: Tensor) -> Tensor:  # [H]
    turned = error @ view.root
    patches = turned[:, 1:]
    shared = (view.coherence - 1).clamp(min=0) / patches.shape[1] * patches.sum(1).square().sum(1)
    return turned.square().sum((1, 2)) + shared


@pytest.mark.parametrize("sampler", ["lattice", "grid", "norm-grid", "fps"])
@pytest.mark.parametrize(("corrected", "core"), [(False, None), (True, None), (False, ChebyshevSteps(8, 0.05))])
def test_moments_give_the_loss_that_the_error_has(
    subject: TorchSubject, views: list[BlockView], sampler: Any, corrected: bool, core: ChebyshevSteps | None
) -> None:
    group = [
        Candidate(9, sampler, True, 6),
        candidate := Candidate(9, sampler, True, 3, core),
        Candidate(9, sampler, True, 2),
    ]
    for view in views:
        found = measure_block(view, subject.layout, group, SharedFeatures(), kernel=3)[candidate]
        fit = fit_correction(found, 1, corrected=corrected)
        kernels = tuple(tuple(row) for row in fit.kernels.tolist())
        correction = Correction(size=3, kernels=kernels, gains=tuple(fit.gains.tolist())) if corrected else None
        error = error_of(view, candidate, correction)
        torch.testing.assert_close(fit.losses.float(), direct_loss(view, error), rtol=2e-3, atol=1e-9)
        assert view.gradients is not None
        effects = (view.gradients * error).sum((2, 3)).square().mean(0)
        torch.testing.assert_close(fit.effects.float(), effects, rtol=2e-3, atol=1e-9)


def test_a_correction_never_raises_the_loss_that_it_was_fitted_to(
    subject: TorchSubject, views: list[BlockView]
) -> None:
    candidate = Candidate(9, "lattice", False, 6)
    for view in views:
        found = measure_block(view, subject.layout, [candidate], SharedFeatures(), kernel=3)[candidate]
        plain, fitted = (fit_correction(found, 1, corrected=flag).losses for flag in (False, True))
        assert bool((fitted <= plain * (1 + 1e-6)).all())
        assert float(fitted.sum()) < 0.95 * float(plain.sum())


def test_a_small_error_costs_what_the_gradients_say(
    subject: TorchSubject, pictures: list[NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of one head, injected into an exact run: shared by all tokens, and different from token to token."""
    monkeypatch.setattr(subjects, "PROBES", 96)
    views: list[BlockView] = []
    subject.look(pictures[1], views.append)
    reference = subject.tokens(subject.run(pictures[1], None))
    for view, kind in ((views[0], "shared"), (views[1], "shared"), (views[1], "own")):
        error = torch.zeros_like(view.exact)
        tokens = 1 if kind == "shared" else error.shape[2]
        error[:, 2] = torch.randn(1, tokens, error.shape[3]) * 0.02 * view.exact.std()

        def inject(call: AttentionCall, block: int = view.number, error: Tensor = error) -> Tensor | None:
            return call.out + error if call.block == block else None

        with observed(subject.model.module, inject):
            given = subject.tokens(subject.run(pictures[1], None))
        cosines = (given * reference).sum(-1) / np.linalg.norm(given, axis=-1) / np.linalg.norm(reference, axis=-1)
        assert view.gradients is not None
        predicted = float((view.gradients * error[0]).sum((1, 2, 3)).square().mean())
        assert predicted == pytest.approx(float((1 - cosines).mean()), rel=0.4)


def test_a_focal_candidate_loses_what_its_error_weighs(subject: TorchSubject, views: list[BlockView]) -> None:
    candidate = FocalCandidate(4, ((1, 0), (2, 1)), 2)
    for view in views:
        found = fit_correction(measure_focal(view, subject.layout, [candidate])[candidate], 1, corrected=True)
        out = focal_attention(
            view.query, view.key, view.value, patches=(8, 8), prefix_tokens=1, tile=4, levels=candidate.levels, hot=2,
            seed=view.number, scale=view.scale,
        )  # fmt: skip
        error = (out[0] - view.exact[0])[:, 1:]
        shared = (view.coherence - 1).clamp(min=0)[:, None, None] / error.shape[1]
        turned = error @ view.root
        expected = turned.square().sum((1, 2)) + (shared * turned.sum(1, keepdim=True).square()).sum((1, 2))
        torch.testing.assert_close(found.losses, expected.double(), rtol=1e-4, atol=0)
        assert view.gradients is not None
        seen = (view.gradients[:, :, 1:] * error).sum((2, 3)).square().mean(0)
        torch.testing.assert_close(found.effects, seen.double(), rtol=1e-4, atol=0)


def test_a_focal_loss_is_taken_from_some_tiles_and_scaled_to_all(
    subject: TorchSubject, views: list[BlockView], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = [FocalCandidate(2, ((1, 0), (2, 2)), hot) for hot in (0, 4)]
    whole = [measure_focal(view, subject.layout, candidates) for view in views]
    monkeypatch.setattr(measure_focal_module, "SAMPLED_QUERIES", 32)
    measure_focal_module._some_tiles.cache_clear()
    some = [measure_focal(view, subject.layout, candidates) for view in views]
    for found, expected in zip(some, whole, strict=True):
        for candidate in candidates:
            ratio = found[candidate].energy.sum() / expected[candidate].energy.sum()
            assert ratio != 1
            assert 0.5 < ratio < 2
    measure_focal_module._some_tiles.cache_clear()
