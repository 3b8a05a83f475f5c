"""What all tests share: checked shapes, few threads, real images where there are any."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from neo_nb.base.shape_checks import setup  # noqa: E402

setup()


@pytest.fixture
def bccd() -> Path:
    """The folder of the bccd data set, from NEO_DATA or beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("NEO_DATA", beside)) / "bccd"
    if not folder.is_dir():
        pytest.skip(f"bccd is not at {folder}; set NEO_DATA")
    return folder
