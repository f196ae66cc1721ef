"""What is thought and what is answered, however the text is cut into pieces."""

import pytest

from coterie.serve.thinking import Thinking

TEXT = "Well.<think>\nIs 1 < 2?</think>\n\nYes, a<b."
THOUGHT = "<think>\nIs 1 < 2?</think>"


def split(pieces, inside=False):
    thinking = Thinking(inside)
    found = [*(part for piece in pieces for part in thinking.feed(piece)), *thinking.end()]
    return "".join(text for text, thought in found if thought), "".join(text for text, thought in found if not thought)


@pytest.mark.parametrize("length", range(1, len(TEXT) + 1))
def test_pieces_of_any_length(length):
    pieces = [TEXT[i : i + length] for i in range(0, len(TEXT), length)]
    assert split(pieces) == (THOUGHT, TEXT.replace(THOUGHT, ""))


def test_text_may_begin_inside():
    assert split(["so", " it is</thi", "nk>Yes"], inside=True) == ("so it is</think>", "Yes")


def test_a_beginning_of_a_tag_that_does_not_go_on_is_text():
    assert split(["a <thin"]) == ("", "a <thin")
    assert split(["a <thin", "g>"]) == ("", "a <thing>")


def test_only_what_may_be_a_tag_is_held_back():
    thinking = Thinking()
    assert list(thinking.feed("a < b <")) == [("a < b ", False)]
