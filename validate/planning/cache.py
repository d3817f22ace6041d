"""Finished steps of planning on disk, so that a run that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fna import __version__
from fna.chebyshev import ChebyshevSteps
from fna.files import written_whole
from fna.validate.planning.candidates import Candidate, FocalCandidate
from fna.validate.planning.measure import MOMENTS, Measurement, Moments


def _candidate(
    landmarks: int, sampler: str, resample: bool, iterations: int, core: tuple[int, float] | None, *corrected: bool
) -> Candidate:
    chebyshev = None if core is None else ChebyshevSteps(*core)
    return Candidate(landmarks, sampler, resample, iterations, chebyshev, *corrected)


KINDS: dict[str, Callable[..., Any]] = {Candidate.kind: _candidate, FocalCandidate.kind: FocalCandidate}


def load_or_make(folder: Path | None, name: str, settings: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Return what `make` returned when it was called before under this name, with these settings, by this version; or call it.

    Args:
        folder: of the cache; None keeps nothing.
        name: of the step.
        settings: all that the result depends on; told apart by their representation.
        make: makes a `Measurement`, or plain containers and tensors.
    """
    if folder is None:
        return make()
    key = hashlib.sha256(repr((*settings, __version__)).encode()).hexdigest()[:16]
    path = folder / f"{name}-{key}.pt"
    if path.is_file():
        try:
            return _unpack(torch.load(path, weights_only=True))
        except Exception:  # a file cut short by an interruption is made anew
            path.unlink()
    value = make()
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        torch.save(_pack(value), unfinished)
    return value


def digest_pixels(pixels: NDArray[np.float32]) -> str:
    """Return what tells one image from another in the name of a step."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


def _pack(value: Any) -> Any:
    """Plain containers and tensors only, so that a cache file cannot run code."""
    if isinstance(value, Measurement):
        rows = []
        for (block, candidate), moments in value.moments.items():
            values = (getattr(candidate, part.name) for part in fields(candidate))
            settings = [
                candidate.kind,
                *(astuple(each) if isinstance(each, ChebyshevSteps) else each for each in values),
            ]
            rows.append([block, settings, [getattr(moments, name) for name in MOMENTS]])
        return {"images": value.images, "rows": rows}
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict) and "rows" in value:
        moments = {
            (block, KINDS[kind](*settings)): Moments(*tensors) for block, (kind, *settings), tensors in value["rows"]
        }
        return Measurement(value["images"], moments)
    return value
