"""What a person on the device reads and runs: the scripts, their settings, the runner's sources, a README."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from fna import __version__
from fna.engines.bundle.format import BundleManifest, list_files
from fna.engines.bundle.models import has_open_batch
from fna.engines.bundle.plugin_files import REGISTER_SOURCE
from fna.engines.flavours import FLAVOURS
from fna.engines.lowerings import rules_for
from fna.engines.targets import Target, capability_text

_HERE = Path(__file__).resolve().parent


def write_device_files(root: Path, manifest: BundleManifest, target: Target) -> None:
    """Write them into a bundle's folder."""
    for name in ("build_engine.sh", "check.sh", "serve.sh"):
        shutil.copyfile(_HERE / "scripts" / name, root / name)
        (root / name).chmod(0o755)
    if "JetPack 6" in target.systems:  # the only one that has an image of its own
        shutil.copyfile(_HERE / "scripts" / "Dockerfile", root / "Dockerfile")
    (root / "runner").mkdir()
    for source in sorted((_HERE / "runner").iterdir()):
        shutil.copyfile(source, root / "runner" / source.name)
    (root / "settings.sh").write_text(_settings(root, manifest), encoding="utf-8")
    (root / "README.md").write_text(_readme(root, manifest, target), encoding="utf-8")


def _settings(root: Path, manifest: BundleManifest) -> str:
    """What the scripts need of the manifest, since a device need not have anything that reads JSON."""
    shapes = next(iter(manifest.profiles.values()))
    batch = f"{shapes.smallest[0]}:{shapes.usual[0]}:{shapes.largest[0]}"
    minimum = manifest.flavours.get("tensorrt", "10.3")
    lowerings = tuple(dict.fromkeys(model.lowering for model in manifest.models))
    sources = [path.relative_to(root).as_posix() for path in sorted((root / "plugin" / "src").rglob("*.cpp"))]
    precisions = tuple(dict.fromkeys(model.precision for model in manifest.models))
    inputs = [f"{name}={'x'.join(map(str, shape.usual[1:]))}" for name, shape in manifest.profiles.items()]
    check = manifest.check
    values: dict[str, str | Iterable[str]] = {
        "TARGET": manifest.target,
        "ONNX_SHA256": manifest.onnx_sha256,
        "FLAVOURS": tuple(manifest.flavours),
        "LOWERINGS": lowerings,
        "LOWERING_RULES": [
            f"{runtime} {_version_number(since)} {form if form in lowerings else 'portable'}"
            for runtime, since, form in rules_for(manifest.flavours, manifest.plugin is not None)
        ],
        "MINIMUM_TENSORRT": str(_version_number(minimum)),
        "MINIMUM_TENSORRT_TEXT": minimum,
        "DEFAULT_PRECISION": manifest.precision,
        "PRECISIONS": precisions,
        "DYNAMIC": str(int(manifest.dynamic)),
        "DYNAMIC_BATCH": str(int(manifest.dynamic and has_open_batch(root, manifest))),
        "DEFAULT_BATCH": batch,
        "INPUT_SHAPES": inputs,
        "PLUGIN_SOURCES": [source for source in sources if not source.endswith(REGISTER_SOURCE)],
        "PREBUILT_FOR": manifest.plugin.prebuilt if manifest.plugin is not None else (),
        "CHECK_INPUTS": [f"{name}={path}" for name, path in check.inputs.items()],
        "CHECK_OUTPUTS": [f"{name}={path}" for name, path in check.outputs.items()],
        "TASK_TOLERANCES": [
            f"{name}={measure}:{limit:g}"
            for name, task in check.tasks.items()
            for measure, limit in task.limits().items()
        ],
        "REFERENCE": f"FNA in PyTorch fp32 on {', '.join(check.images)}"
        if check.reference == "pytorch"
        else f"onnxruntime on {manifest.onnx_name}, on {', '.join(check.images)}",
    }
    for precision, tolerance in check.tolerances.items():
        values[f"TOLERANCE_{precision}"] = f"{tolerance.relative_l2:g} {tolerance.cosine:g}"
    lines = ["# What the scripts need of manifest.json. Written by fna bundle; SHA256SUMS covers it.\n"]
    for key, value in values.items():
        text = shlex.quote(value) if isinstance(value, str) else f"({' '.join(shlex.quote(word) for word in value)})"
        lines.append(f"{key}={text}\n")
    return "# shellcheck disable=SC2034\n" + "".join(lines)


def _version_number(version: str) -> int:
    """As TensorRT prints it: 100300 for 10.3."""
    major, minor = (int(part) for part in f"{version}.0".split(".")[:2])
    return major * 10000 + minor * 100


def _readme(root: Path, manifest: BundleManifest, target: Target) -> str:
    text = (_HERE / "scripts" / "README.md").read_text(encoding="utf-8")
    shapes = next(iter(manifest.profiles.values()))
    plan = manifest.metadata.plan
    size = sum((root / name).stat().st_size for name in list_files(root))
    tolerances = [
        f"| {precision} | {tolerance.relative_l2:g} | {tolerance.cosine:g} |"
        for precision, tolerance in manifest.check.tolerances.items()
    ]
    tasks = [
        f"| `{name}`, {task.task} | {', '.join(f'{measure} {limit:g}' for measure, limit in task.limits().items())} |"
        for name, task in manifest.check.tasks.items()
    ]
    plugin = manifest.plugin
    values = {
        "name": manifest.name,
        "target": manifest.target,
        "devices": target.devices,
        "capabilities": capability_text(*manifest.capabilities),
        "flavours": " or ".join(f"{FLAVOURS[name].title} {low} or later" for name, low in manifest.flavours.items()),
        "source": manifest.metadata.source,
        "attention": plan.describe_blocks(),
        "precisions": ", ".join((f"{manifest.precision} (default)", *list(manifest.check.tolerances)[1:])),
        "input": ", ".join(f"`{name}` {list(shape.usual)}" for name, shape in manifest.profiles.items()),
        "batch": " to ".join(dict.fromkeys(str(shape[0]) for shape in (shapes.smallest, shapes.largest))),
        "images": ", ".join(manifest.check.images),
        "reference": "FNA in PyTorch fp32" if manifest.check.reference == "pytorch" else "onnxruntime",
        "tolerances": "\n".join(tolerances),
        "tasks": "\n".join(
            ["", "In 8 bits outputs are held to what they are for:", "", "| output | |", "|---|---|", *tasks, ""]
        )
        if tasks
        else "",
        "prebuilt": (
            "prebuilt for " + ", ".join(plugin.prebuilt) if plugin and plugin.prebuilt else "no prebuilt library"
        ),
        "megabytes": f"{size / 1e6:.0f}",
        "version": __version__,
    }
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text)
