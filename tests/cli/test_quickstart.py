"""The whole quickstart, as `make demo` runs it."""

from __future__ import annotations

import re


def test_quickstart_compares_the_formats_and_writes_text(coterie):
    ran = coterie("quickstart")
    assert ran.code == 0, ran.err
    rows = {m[1]: float(m[2]) for m in re.finditer(r"│ (\w+ \w+) +│[^│]+│[^│]+│ +([\d.]+) │", ran.out)}
    assert set(rows) == {"transformers bf16", "coterie bf16", "coterie int8", "coterie int4"}
    for name, perplexity in rows.items():
        assert abs(perplexity / rows["transformers bf16"] - 1) < 0.03, name
    written = ran.out.split("When an exception is raised,")[1]
    assert len(written.split("Next:")[0].split()) > 10
