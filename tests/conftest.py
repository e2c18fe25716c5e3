"""Shared fixtures. Reference data is found through the environment variable HFCLIP_TEST_DATA."""

import os
from pathlib import Path

import pytest


# Before any transformers or datasets import: tests never reach for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is imported: processes that share the cores (pytest -n) do better with a part of them each.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of reference data (golden weights and outputs, photos); skips the test where there is none."""
    folder = os.environ.get("HFCLIP_TEST_DATA")
    if not folder:
        pytest.skip("needs reference data: set HFCLIP_TEST_DATA to its folder")
    return Path(folder)


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    """Nothing is left in the user's own cache, and no test finds what another has left."""
    monkeypatch.setenv("HFCLIP_CACHE", str(tmp_path / "cache"))
