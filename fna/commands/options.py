"""Options that commands share, each declared once with its flag, type, default and help, and how their text becomes values.

An option is a function that makes click's decorator. A command names the options that it takes, and says only what is different there:
`@options.resolution()`, or `@options.resolution(multiple=True)`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fna.chebyshev import (
    CORES,
    MAX_CHEBYSHEV_STEPS,
    MORE_STEPS_LANDMARKS,
    NEWTON_SCHULZ_LANDMARKS,
    usual_steps,
)
from fna.errors import InvalidArgumentError
from fna.export.passes import LOWERINGS
from fna.plan import DEFAULT_LANDMARKS, DEFAULT_METHOD, METHODS
from fna.precision import PRECISIONS
from fna.samplers import DEFAULT_SAMPLER, sampler_names

if TYPE_CHECKING:
    from PIL.Image import Image

    from fna.export.variants import FileVariant
    from fna.plan import Plan

SAMPLERS = sampler_names()
PATH: Any = click.Path(path_type=Path)

Option = Callable[..., Callable[[Any], Any]]


class Resolution(click.ParamType):
    """`518` or `HEIGHTxWIDTH`, as (height, width) in pixels."""

    name = "size"

    def convert(self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None) -> Any:
        """Parse the text.

        Raises:
            InvalidArgumentError: for other text.
        """
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", str(value).strip())
        if match is None:
            raise InvalidArgumentError(f"resolution {value!r} cannot be read; write 518 or 518x784 (height x width)")
        return int(match[1]), int(match[2] or match[1])


class InputShape(click.ParamType):
    """`NAME=1x3x224x224`, as (name, shape)."""

    name = "shape"

    def convert(self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None) -> Any:
        """Parse the text.

        Raises:
            InvalidArgumentError: for other text.
        """
        match = re.fullmatch(r"(.+)=(\d{1,6}(?:x\d{1,6})*)", str(value).strip())
        if match is None or "0" in match[2].split("x"):
            raise InvalidArgumentError(f"input shape {value!r} cannot be read; write NAME=1x3x224x224")
        return match[1], tuple(int(size) for size in match[2].split("x"))


resolution: Option = partial(
    click.option,
    "--resolution",
    type=Resolution(),
    help="Image size for files that leave it open: 518, or HEIGHTxWIDTH.",
)
input_shapes: Option = partial(
    click.option,
    "--input-shape",
    "input_shapes",
    type=InputShape(),
    multiple=True,
    help="NAME=1x3x224x224: a size that an open input takes (repeatable).",
)
output: Option = partial(click.option, "-o", "--output", type=PATH)
images: Option = partial(
    click.option,
    "--images",
    type=PATH,
    help="Folder of photographs.  [default: five that scikit-image and scikit-learn carry]",
)
batch_range: Option = partial(
    click.option, "--batch", help="Batch sizes: 1, 1:4 (smallest:largest), 1:4:8 (with the usual)."
)
batch_size: Option = partial(click.option, "--batch", type=click.IntRange(min=1), default=1, show_default=True)
precision: Option = partial(click.option, "--precision", type=click.Choice(PRECISIONS))
keep_fp32: Option = partial(
    click.option, "--keep-fp32", help="Blocks that stay fp32 in models that are cast, as in 0,11."
)
int8: Option = partial(
    click.option, "--int8", is_flag=True, help="Linear layers in int8, calibrated on the photographs."
)
fp8: Option = partial(
    click.option, "--fp8", is_flag=True, help="Linear layers in fp8 (E4M3); with --int8 each in what it bears best."
)
keep_linear: Option = partial(
    click.option,
    "--keep-fp16-linear",
    "keep_linear",
    help="Linear layers that stay out of 8 bits: NAME,NAME, or auto:0.9995 for as few as keep that cosine.",
)
target: Option = partial(click.option, "--target", help="The device, as in jetson-agx-orin; fna doctor lists them.")
lowering: Option = partial(
    click.option,
    "--lowering",
    type=click.Choice([lowering for lowering in LOWERINGS if not lowering.startswith("onnxruntime")]),
    help="Form of the file.  [default: what docs/engines.md says of the runtime, its version and the target]",
)
plot: Option = partial(click.option, "--plot", type=PATH, help="The picture to draw: .svg, .png or .pdf.")
plugin: Option = partial(click.option, "--plugin", type=PATH, help="libfna_plugin.so.  [default: that of fna plugin]")
weights: Option = partial(
    click.option,
    "--weights",
    type=PATH,
    help="File of weights, .safetensors or .pth, for timm:, open_clip:, torchvision: and factory models.",
)
json_file: Option = partial(
    click.option, "--json", "json_file", type=PATH, help="Write every number as JSON to this file; - prints it."
)
quiet: Option = partial(click.option, "--quiet", is_flag=True, help="Print nothing but errors.")

# By the name of what they set: an argument of `uniform_plan`, or a field of `Plan`.
_USUAL_STEPS = usual_steps(MORE_STEPS_LANDMARKS), usual_steps(MORE_STEPS_LANDMARKS + 1)

PLAN: Mapping[str, Option] = {
    "layers": partial(
        click.option,
        "--layers",
        help="Blocks that become FNA: 6-11, or 0-2,6-11, all, none, or auto (see fna plan).  [default: the later half]",
    ),
    "landmarks": partial(
        click.option,
        "--landmarks",
        type=click.IntRange(min=1),
        default=DEFAULT_LANDMARKS,
        show_default=True,
        help="Landmarks S per block.",
    ),
    "sampler": partial(
        click.option,
        "--sampler",
        type=click.Choice(SAMPLERS),
        default=DEFAULT_SAMPLER,
        show_default=True,
        help="How landmarks are chosen.",
    ),
    "method": partial(
        click.option,
        "--method",
        type=click.Choice(METHODS),
        default=DEFAULT_METHOD,
        show_default=True,
        help="weighted: landmark weights and exact rows; published: the paper's.",
    ),
    "core": partial(
        click.option,
        "--core",
        type=click.Choice(CORES),
        help=f"What stands for the pseudo-inverse.  [default: chebyshev for more than {NEWTON_SCHULZ_LANDMARKS} weighted landmarks, "
        "else newton_schulz]",
    ),
    "steps": partial(
        click.option,
        "--steps",
        type=click.IntRange(1, MAX_CHEBYSHEV_STEPS),
        help=f"Of the chebyshev core.  [default: {_USUAL_STEPS[0].steps} for up to {MORE_STEPS_LANDMARKS} landmarks, "
        f"else {_USUAL_STEPS[1].steps}]",
    ),
    "low": partial(
        click.option,
        "--low",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help=f"The lowest eigenvalue that the steps aim at.  [default: {_USUAL_STEPS[0].low} for up to {MORE_STEPS_LANDMARKS} "
        f"landmarks, else {_USUAL_STEPS[1].low}]",
    ),
    "resample": partial(click.option, "--resample", is_flag=True, help="Choose landmarks anew in every block."),
    "prefix_tokens": partial(
        click.option,
        "--prefix-tokens",
        type=click.IntRange(min=0),
        help="Class and register tokens.  [default: detected]",
    ),
    "seed": partial(click.option, "--seed", type=int, default=0, show_default=True, help="For the random sampler."),
}
_PLAN_FILE: Option = partial(
    click.option, "--plan", "file", type=PATH, help="A plan file instead of the options above."
)


@dataclass(frozen=True)
class PlanChoice:
    """What the plan options say: a file, or one setting for all chosen blocks; `given` are the options that the user wrote."""

    settings: Mapping[str, Any]
    file: Path | None
    given: frozenset[str] = frozenset()

    @property
    def is_left_open(self) -> bool:
        """Whether nothing was said of which blocks become what, and how."""
        return self.file is None and self.given <= {"prefix_tokens"}

    @property
    def is_automatic(self) -> bool:
        """Whether blocks and landmarks are to be searched for (`--layers auto`)."""
        return self.file is None and self.settings["layers"] == "auto"

    def load(self) -> Plan | None:
        """Return the plan of the file; None without one.

        Raises:
            InputFileError, InvalidPlanError: naming what is wrong with it.
        """
        from fna.plan import load_plan

        return None if self.file is None else load_plan(self.file)

    def make(self, num_blocks: int, **changes: Any) -> Plan:
        """Return the plan of the file, or the uniform plan of the other options.

        Raises:
            InputFileError, InvalidPlanError: naming what was wrong.
            InvalidArgumentError: for `--layers auto`.
        """
        from fna.plan import uniform_plan

        if self.is_automatic:
            raise InvalidArgumentError(
                "--layers auto plans for one resolution, which this command does not: make a plan with fna plan and give it as --plan"
            )
        return self.load() or uniform_plan(num_blocks, **{**self.settings, **changes})


@dataclass(frozen=True)
class PrecisionChoice:
    """What the precision options say."""

    precision: str | None
    int8: bool
    fp8: bool
    keep_fp32: str | None
    keep_linear: str | None

    def variant(self) -> FileVariant:
        """Return what to make of an fp32 file.

        Raises:
            InvalidArgumentError: if the blocks cannot be read.
        """
        from fna.block_numbers import parse_blocks
        from fna.export.variants import FileVariant

        if self.keep_linear is not None and not (self.int8 or self.fp8):
            raise InvalidArgumentError("--keep-fp16-linear keeps layers out of 8 bits; give --int8 or --fp8 with it")
        eight_bit = tuple(kind for kind, wanted in (("int8", self.int8), ("fp8", self.fp8)) if wanted)
        kept, goal = _parse_kept_layers(self.keep_linear or "")
        precision: Any = self.precision or "fp32"
        return FileVariant(precision, eight_bit, parse_blocks(self.keep_fp32), kept, goal)  # type: ignore[arg-type]


def plan_options(*, without: Sequence[str] = (), **changes: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Add the options that say which blocks become FNA, and how; the command gets them as `plan`, a `PlanChoice`.

    Args:
        without: names in `PLAN` that the command does not take.
        changes: what the command says differently of an option, by its name in `PLAN`.
    """
    members = {name: make(**changes.get(name, {})) for name, make in PLAN.items() if name not in without}

    def gather(values: dict[str, Any]) -> PlanChoice:
        context = click.get_current_context()
        given = {name for name in members if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
        return PlanChoice({name: values[name] for name in members}, values["file"], frozenset(given))

    return _gathered("plan", {**members, "file": _PLAN_FILE()}, gather)


def precision_options(function: Any) -> Any:
    """Add the options that cast a file; the command gets them as `precision`, a `PrecisionChoice`."""
    members = {
        "precision": precision(
            help="Cast weights and activations; inputs, outputs, norms and softmax stay fp32.  [default: the file's]"
        ),
        "int8": int8(),
        "fp8": fp8(),
        "keep_fp32": keep_fp32(),
        "keep_linear": keep_linear(),
    }
    return _gathered("precision", members, lambda values: PrecisionChoice(**values))(function)


def _parse_kept_layers(text: str) -> tuple[tuple[str, ...], float | None]:
    """Names of linear layers, or the cosine of `auto:0.9995`."""
    if not text.startswith("auto:"):
        return tuple(part.strip() for part in text.split(",") if part.strip()), None
    try:
        goal = float(text.removeprefix("auto:"))
    except ValueError:
        goal = 0.0
    if not 0 < goal < 1:
        raise InvalidArgumentError(
            f"--keep-fp16-linear {text!r} cannot be read; a cosine below 1 is needed, as in auto:0.9995"
        )
    return (), goal


def _gathered(
    name: str, members: dict[str, Callable[[Any], Any]], gather: Callable[[dict[str, Any]], Any]
) -> Callable[[Any], Any]:
    """Add options to a command, which gets them as one argument."""

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def command(**values: Any) -> Any:
            own = {member: values.pop(member) for member in members}
            return function(**values, **{name: gather(own)})

        for add in reversed(members.values()):
            command = add(command)
        return command

    return decorate


def load_photographs(folder: Path | None) -> tuple[list[tuple[str, Image]], list[str]]:
    """Return the photographs of `--images`, or the bundled ones, and a line for each file that could not be read."""
    from fna.export.preprocessing import bundled_photographs, load_images

    return (bundled_photographs(), []) if folder is None else load_images(folder)
