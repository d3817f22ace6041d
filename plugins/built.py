"""Where `make plugin` puts what it builds. Importing it needs nothing but the standard library."""

from __future__ import annotations

import platform
from pathlib import Path

TABLE_FOLDER = Path(__file__).resolve().parent.parent / "build" / "plugin"
"""The kernel table; the libraries lie in a folder of it for each kind of machine."""

LIBRARY_FOLDER = TABLE_FOLDER / platform.machine()
"""The libraries for this machine."""

LIBRARY = "libfna_plugin.so"
