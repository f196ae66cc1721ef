"""Loads the checkpoint folders given, in a process of its own, and prints what each took: bytes, a line of JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers

import coterie


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def main(warm: str, folders: list[str]) -> None:
    transformers.utils.logging.disable_progress_bar()
    coterie.from_pretrained(warm)
    for folder in folders:
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        model = coterie.from_pretrained(folder)
        print(json.dumps({"peak": status("VmHWM") - before, "kept": model.get_memory_footprint()}))
        del model


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
