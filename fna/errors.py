"""Every error that a user can cause or meet, with the exit code that the command line gives it.

A message says what was given, what is needed, and how to mend it, in one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class FnaError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what `fna` exits with."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, its type's name where it has none: other libraries' reasons, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe_validation_error(name: str, error: ValidationError) -> str:
    """Say in one line which key of a validated document is wrong, and why."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "document"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{name}: {where}: {first['msg']}{more}"


class InvalidShapeError(FnaError, ValueError):
    """A tensor has the wrong rank or size."""


class InvalidDtypeError(FnaError, TypeError):
    """A tensor has a type that the operation does not take, or two tensors do not match."""


class InvalidLandmarksError(FnaError, ValueError):
    """The landmarks asked for cannot be chosen, or the indices given are not token indices."""


class InvalidArgumentError(FnaError, ValueError):
    """An argument is outside its range or not one of the choices."""


class UnsupportedAttentionError(FnaError):
    """An attention block is not plain, full self-attention and therefore never becomes FNA."""


class InvalidPlanError(FnaError, ValueError):
    """A plan does not fit the model, or a plan file is malformed."""


class InputFileError(FnaError):
    """A file is missing, empty, unreadable or not of the kind that is needed."""


class ModelSourceError(FnaError):
    """A model cannot be found, loaded or run at the size asked for."""


class BuildError(FnaError):
    """A builder or parser refused the model; the message names the node where it is known."""


class CheckFailedError(FnaError):
    """Everything ran, but a number is outside its tolerance."""

    exit_code = 1


class MissingCapabilityError(FnaError):
    """This machine lacks something: a GPU, TensorRT, an optional package."""

    exit_code = 3
