"""Loads the common test mixins of transformers, which stand in its source distribution and not in its wheel.

`HFCLIP_TRANSFORMERS_SDIST` names the unpacked distribution of the installed version; without it the tests of this
folder are skipped. Its folder `tests` becomes the package `transformers_tests`. What the mixins import and the
distribution lacks is put in their place in memory; none of it concerns an encoder of images and texts.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import transformers


PACKAGE = "transformers_tests"
# Fields that each config shall store, and pass on, whatever the model; `ConfigTester` takes them from a file of the
# repository that the distribution lacks.
CONFIG_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "cat", 1: "dog"},
    "label2id": {"cat": 0, "dog": 1},
    "problem_type": "regression",
}


def load(name: str) -> ModuleType:
    """A module of the distribution's `tests`; skips the calling test module where there is no distribution.

    Raises:
        RuntimeError: the distribution is not that of the installed transformers.
    """
    if PACKAGE not in sys.modules:
        _register(_distribution() / "tests")
    # Some of the modules would import transformers anew, from the place that it has in its repository.
    with mock.patch.object(transformers.utils, "direct_transformers_import", lambda path: transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")


def _distribution() -> Path:
    folder = os.environ.get("HFCLIP_TRANSFORMERS_SDIST")
    version = transformers.__version__
    if not folder:
        pytest.skip(
            f"needs the unpacked source distribution of transformers {version}: set HFCLIP_TRANSFORMERS_SDIST to its "
            "folder, as .ci/run does",
            allow_module_level=True,
        )
    info = Path(folder) / "PKG-INFO"
    found = info.read_text(encoding="utf-8") if info.is_file() else ""
    if f"\nVersion: {version}\n" not in found.partition("\n\n")[0] + "\n":
        lines = [line for line in found.splitlines() if line.startswith("Version: ")]
        raise RuntimeError(
            f"HFCLIP_TRANSFORMERS_SDIST={folder}: found {lines[0] if lines else 'no distribution'}, expected the "
            f"unpacked source distribution of transformers {version}, the version installed."
        )
    return Path(folder)


def _register(tests: Path) -> None:
    """Makes `tests` importable as a package, with empty stand-ins for what it imports and does not contain."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package
    missing = {
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_FIELDS},
    }
    for name, contents in missing.items():
        parent = name.partition(".")[0]
        for full_name in (f"{PACKAGE}.{parent}", f"{PACKAGE}.{name}"):
            sys.modules[full_name] = ModuleType(full_name)
        vars(sys.modules[f"{PACKAGE}.{name}"]).update(contents)
    # A module of the repository's `utils`, where test files of the Hub are kept: no test here reads one.
    sys.modules["fetch_hub_objects_for_ci"] = ModuleType("fetch_hub_objects_for_ci")
    sys.modules["fetch_hub_objects_for_ci"].url_to_local_path = lambda url: url
