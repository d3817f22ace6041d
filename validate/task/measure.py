"""Whether the model still does its job: every task that it and the images allow.

Everything compares exact attention in PyTorch with the last step of the chain that can be run (the file; the engine, where it
runs), except the probe on digits. A further task is a file with a function of `Results` and `TaskInputs`, and a line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from fna.runtime import Arrays
from fna.validate.budget.chain import Chain, Say
from fna.validate.budget.measure import Outputs
from fna.validate.photographs import Photographs
from fna.validate.task.classification import measure_classification
from fna.validate.task.digits_probe import DIGITS, measure_digits_probe
from fna.validate.task.inputs import OutputKinds, TaskInputs, collect_vectors, output_kinds, vectors_of
from fna.validate.task.projected_tokens import measure_projected_tokens
from fna.validate.task.results import Results, TaskResult
from fna.validate.task.retrieval import measure_retrieval
from fna.validate.task.saliency import measure_saliency
from fna.validate.task.segmentation import measure_segmentation

TASKS: dict[str, Callable[[Results, TaskInputs], None]] = {
    "retrieval": measure_retrieval,
    "classification": measure_classification,
    "saliency": measure_saliency,
    "segmentation": measure_segmentation,
    "projected tokens": measure_projected_tokens,
    "digits probe": measure_digits_probe,
}
"""By the names that numbers are reported under, in that order."""


def measure_tasks(
    chain: Chain, last: str, photographs: Photographs, outputs: Outputs, on_step: Say, *, digits: int = DIGITS
) -> TaskResult:
    """Measure every task that the model and the images allow.

    Args:
        chain: from `open_chain`.
        last: the stage that is compared with exact attention.
        photographs: the images, with labels where there are class folders.
        outputs: of the images that were kept, for maps and patch features.
        on_step: called with what is being done, how much of it is done, and how much there is.
        digits: images of the linear probe; half of them are held out.

    Raises:
        InputFileError: if the labels do not match the model's, or are too few to hold some out.
    """
    vectors = collect_vectors(chain, last, photographs, outputs, on_step)
    kinds = output_kinds(chain, outputs.exact)
    inputs = TaskInputs(kinds, outputs.exact, outputs.exported, vectors, chain, photographs.labels, digits, on_step)
    return _measure(inputs, TASKS)


def compare_outputs(
    kinds: OutputKinds,
    exact: Arrays,  # [M, ...] each
    approximated: Arrays,
    tasks: Collection[str] | None = None,
) -> TaskResult:
    """Measure what the outputs of the same images, exact and otherwise, say by themselves: all tasks but the probes.

    Args:
        kinds: what the outputs are.
        exact: outputs of M images by name.
        approximated: the same, to be compared.
        tasks: those that are measured; None is all.
    """
    inputs = TaskInputs(kinds, exact, approximated, vectors_of(kinds, exact, approximated))
    return _measure(inputs, TASKS if tasks is None else [task for task in TASKS if task in tasks])


def _measure(inputs: TaskInputs, tasks: Collection[str]) -> TaskResult:
    results = Results()
    for task in tasks:
        TASKS[task](results, inputs)
    return TaskResult(measures=tuple(results.measures), skipped=tuple(results.skipped))
