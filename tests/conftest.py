"""What all tests share: checked shapes, few threads, real images where there are any."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads weights
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


@pytest.fixture(scope="session")
def fo(tmp_path_factory):
    """FiftyOne on a database of this process alone, which can have one; skipped, with the reason, where it has none."""
    from neo_nb.review import fiftyone_db as database

    if database.database_problem() is not None:
        pytest.skip(f"FiftyOne: {database.database_problem()}")
    return database.open_database(tmp_path_factory.mktemp("database"))
