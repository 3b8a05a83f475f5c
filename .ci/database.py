"""FiftyOne's mongod wants OpenSSL 1.1. Where the system has none, take it from a wheel that carries it."""

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = Path(sys.prefix, "lib", "openssl11")
WHEEL = "psycopg2-binary==2.9.9"


def starts() -> bool:
    """Does mongod find its libraries?"""
    mongod = Path(find_spec("fiftyone").submodule_search_locations[0], "db", "bin", "mongod")
    done = subprocess.run([mongod, "--version"], capture_output=True, env={"LD_LIBRARY_PATH": str(LIBRARIES)})
    return done.returncode == 0


def fetch() -> None:
    """Unpack the two libraries under the names they have in the wheel and under their plain ones."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["download", "-q", "--no-deps", "--only-binary=:all:", "--python-version=3.11", "-d", folder, WHEEL]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)
        LIBRARIES.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                base = Path(name).name
                if ".libs/" in name and base.startswith(("libssl-", "libcrypto-")):
                    (LIBRARIES / base).write_bytes(wheel.read(name))
                    plain = LIBRARIES / f"{base.split('-')[0]}.so.1.1"
                    plain.unlink(missing_ok=True)
                    plain.symlink_to(base)


if __name__ == "__main__":
    try:
        if not starts():
            fetch()
        if not starts():
            raise OSError("mongod does not start with it")
    except Exception as error:  # noqa: BLE001 - everything but `neo errors` works without
        print(f"setup: FiftyOne's database cannot start here ({error}); `neo doctor` says what to do")
