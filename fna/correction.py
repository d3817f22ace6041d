"""What a plan puts back of the attention that FNA leaves out."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Weight = Annotated[float, Field(allow_inf_nan=False)]


class Correction(BaseModel):
    """What FNA leaves out, put back: `out = gain * FNA + (kernel over the patch grid) * value`, fitted on photographs.

    Landmark attention is smooth: it loses the attention that a token pays to its near neighbours. A small kernel over the grid
    of patches puts the part of it back that is alike in all images. Prefix tokens and exactly known rows are left as they are.

    Attributes:
        size: of the square kernel, odd.
        kernels: a kernel for each FNA head, row by row.
        gains: the factor on FNA for each FNA head.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=1, le=15)
    kernels: tuple[tuple[_Weight, ...], ...]
    gains: tuple[_Weight, ...]

    @model_validator(mode="after")
    def _check_sizes(self) -> Correction:
        if self.size % 2 == 0:
            raise ValueError(f"size is {self.size}, but a kernel has a middle: an odd size is needed")
        if len(self.kernels) != len(self.gains):
            raise ValueError(
                f"{len(self.kernels)} kernels were given, but {len(self.gains)} gains; both are one per head"
            )
        for head, kernel in enumerate(self.kernels):
            if len(kernel) != self.size**2:
                raise ValueError(f"kernels.{head} has {len(kernel)} weights, but {self.size**2} are needed")
        return self
