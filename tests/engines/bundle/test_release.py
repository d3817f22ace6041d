"""A wheel of `make release`, installed without the checkout, takes a model from export to a bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from fna import __version__
from fna.errors import MissingCapabilityError
from fna.plugins.release import make_release
from fna.plugins.table.kernel_file import without_kernels

from ..conftest import ROOT


@pytest.mark.long
def test_an_installed_wheel_makes_a_bundle_with_its_own_plugin(table: Path, tmp_path: Path) -> None:
    """By pip, into a fresh environment. The table's kernels and libraries are stubs; torch and the like are the tests' own."""
    packages = make_release(ROOT, table, tmp_path / "dist")
    assert [package.name for package in packages] == [
        f"fna-{__version__}-py3-none-manylinux_2_35_aarch64.whl",
        f"fna-{__version__}-py3-none-manylinux_2_35_x86_64.whl",
        f"fna-{__version__}.tar.gz",
    ]
    (wheel,) = (package for package in packages if package.stem.endswith(os.uname().machine))
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    shutil.copy(ROOT / "tests" / "support" / "tiny_vit.py", tmp_path)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def fna(*arguments: str) -> str:
        command = [environment / "bin" / "fna", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    fna("export", "tiny_vit:make", "-o", "tiny.onnx", "--resolution", "56", "--layers", "all", "--landmarks", "6")
    assert "prebuilt for aarch64, x86_64" in fna("bundle", "tiny.onnx", "-o", "orin", "--target", "jetson-agx-orin")
    plugin = tmp_path / "orin" / "plugin"
    library = without_kernels((table / "aarch64" / "libfna_plugin.so").read_bytes())
    carried = (plugin / "kernels" / "kernels.bin").read_bytes()
    assert (plugin / "prebuilt" / "aarch64" / "libfna_plugin.so").read_bytes() == library + carried
    assert fna("plugin", "--list").startswith(str(tmp_path / "cache" / "fna" / "plugin-"))


def test_a_release_without_its_libraries_says_how_to_compile_them(table: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(table, tmp_path / "table")
    (copy / "aarch64" / "libfna_plugin.so").unlink()
    with pytest.raises(MissingCapabilityError, match="fna plugin -o .* --machine aarch64,x86_64"):
        make_release(ROOT, copy, tmp_path / "dist")
