"""What a model thinks aloud before it answers, told from the answer while both arrive."""

from __future__ import annotations

from collections.abc import Iterator

OPEN, CLOSE = "<think>", "</think>"


class Thinking:
    """Splits text that arrives in pieces at <think> and </think>, which may themselves be cut.

    inside: whether the text begins in a block, because the prompt ended with <think>.
    """

    def __init__(self, inside: bool = False) -> None:
        self.inside = inside
        self._held = ""  # what may be the beginning of a tag

    def feed(self, piece: str) -> Iterator[tuple[str, bool]]:
        """(text, whether it is thought), as far as it is known; tags are part of the thought."""
        self._held += piece
        while self._held:
            tag = CLOSE if self.inside else OPEN
            before, found, after = self._held.partition(tag)
            if not found:
                kept = next((n for n in range(len(tag) - 1, 0, -1) if self._held.endswith(tag[:n])), 0)
                before, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
                if before:
                    yield before, self.inside
                return
            self._held = after
            if self.inside:
                yield before + tag, True
            else:
                if before:
                    yield before, False
                yield tag, True
            self.inside = not self.inside

    def end(self) -> Iterator[tuple[str, bool]]:
        """What was held back for a tag that did not come."""
        held, self._held = self._held, ""
        if held:
            yield held, self.inside
