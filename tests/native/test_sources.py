"""What the native sources may not use."""

import re
from pathlib import Path

NATIVE = Path(__file__).parents[2] / "native"


def test_no_streams():
    """A build that carries its own C++ library, and another library's streams in the process, crash each other."""
    streams = re.compile(r"#include <(\w*stream|locale|codecvt|regex|iomanip)>")
    files = [path for path in NATIVE.rglob("*") if path.suffix in (".h", ".cpp")]
    assert len(files) > 50
    assert [path.name for path in files if streams.search(path.read_text())] == []
