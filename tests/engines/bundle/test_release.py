"""A wheel of `make release`, installed without the checkout, takes a model from export to a bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fna import __version__
from fna.errors import MissingCapabilityError
from fna.plugins.release import make_release
from fna.plugins.table.kernel_file import without_kernels

from ..conftest import ROOT


@pytest.mark.long
def test_an_installed_wheel_makes_a_bundle_with_its_own_plugin(table: Path, tmp_path: Path) -> None:
    """The table's kernels and libraries are stubs. The environment is fresh; torch and the like are the tests' own."""
    packages = make_release(ROOT, table, tmp_path / "dist")
    assert [package.name for package in packages] == [
        f"fna-{__version__}-py3-none-manylinux_2_35_aarch64.whl",
        f"fna-{__version__}-py3-none-manylinux_2_35_x86_64.whl",
        f"fna-{__version__}.tar.gz",
    ]
    site = tmp_path / "site"
    with zipfile.ZipFile(packages[1]) as wheel:
        wheel.extractall(site)
    shutil.copy(ROOT / "tests" / "support" / "tiny_vit.py", tmp_path)
    shared = [path for path in sys.path if "site-packages" in path]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(tmp_path), *shared]),
        "XDG_CACHE_HOME": str(tmp_path),
    }

    def fna(*arguments: str) -> str:
        code = "import sys, fna, fna.cli; print(fna.__file__); sys.exit(fna.cli.main(sys.argv[1:]))"
        command = [sys.executable, "-S", "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(site))
        return done.stdout

    fna("export", "tiny_vit:make", "-o", "tiny.onnx", "--resolution", "56", "--layers", "all", "--landmarks", "6")
    assert "prebuilt for aarch64, x86_64" in fna("bundle", "tiny.onnx", "-o", "orin", "--target", "jetson-agx-orin")
    plugin = tmp_path / "orin" / "plugin"
    library = without_kernels((table / "aarch64" / "libfna_plugin.so").read_bytes())
    carried = (plugin / "kernels" / "kernels.bin").read_bytes()
    assert (plugin / "prebuilt" / "aarch64" / "libfna_plugin.so").read_bytes() == library + carried
    assert "sm_87" in fna("plugin", "--list")


def test_a_release_without_its_libraries_says_how_to_compile_them(table: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(table, tmp_path / "table")
    (copy / "aarch64" / "libfna_plugin.so").unlink()
    with pytest.raises(MissingCapabilityError, match="fna plugin -o .* --machine aarch64,x86_64"):
        make_release(ROOT, copy, tmp_path / "dist")
