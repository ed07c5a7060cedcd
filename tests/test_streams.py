"""What is printed, as a terminal shows it, and which outputs of a cell are joined."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_output
from tqdm import tqdm

from expvae_book.streams import Screen, Streams


def shown(*texts):
    screen = Screen()
    for text in texts:
        screen.write(text)
    return screen.text


def line_by_line(text):
    """The same without the way up: each return begins a line anew, and what it is not long enough to cover stays."""
    lines = []
    for line in text.split("\n"):
        seen = ""
        for part in line.split("\r"):
            seen = part + seen[len(part) :]
        lines.append(seen)
    return "\n".join(lines)


TEXTS = st.text(alphabet="ab \r\n", max_size=30)


@given(TEXTS)
def test_a_screen_shows_what_was_written_last_at_each_place(text):
    assert shown(text) == line_by_line(text)


@given(st.lists(st.sampled_from(["a", "bc", "\r", "\n", "\x1b[A", "\x1b[31m"]), max_size=20))
def test_a_text_may_come_in_pieces(parts):
    assert shown(*parts) == shown("".join(parts))


def test_the_way_up_leads_to_the_line_above_and_not_beyond_the_first():
    assert shown("one\ntwo\x1b[A\rO") == "One\ntwo"
    assert shown("\x1b[Aone\n\x1b[A\x1b[A\nx") == "one\nx"
    assert shown("abc\n\x1b[Adef") == "def\n"  # a new line begins on the left


def test_nested_bars_are_a_line_each():
    written = io.StringIO()
    for _ in tqdm(range(3), desc="outer", file=written, mininterval=0, ncols=60):
        for _ in tqdm(range(30), desc="inner", file=written, mininterval=0, ncols=60, leave=False):
            pass
    lines = [line.strip() for line in shown(written.getvalue()).split("\n") if line.strip()]
    assert written.getvalue().count("inner") > 60
    assert len(lines) == 1
    assert lines[0].startswith("outer: 100%")


def joined(*messages):
    """What becomes of the outputs of a cell that come one after the other: streams by name and text, others by None."""
    streams, outputs = Streams(), []
    for name, text in messages:
        outputs.append(new_output("stream", name=name, text=text) if name else new_output("display_data"))
        if name:
            streams.join(outputs)
    return [(output.get("name"), output.get("text")) for output in outputs]


@pytest.mark.parametrize(
    ("messages", "result"),
    [
        ([("err", "\r 1%"), ("err", "\r 2%"), ("err", "\n")], [("err", " 2%\n")]),
        ([("out", "a"), ("err", "b"), ("out", "c")], [("out", "a"), ("err", "b"), ("out", "c")]),
        ([("out", "a"), (None, ""), ("out", "c")], [("out", "a"), (None, None), ("out", "c")]),
        # A bar goes on where it began, and a finished one does not.
        ([("err", "\r 1%"), ("out", "a\n"), ("err", "\r 2%"), ("err", "\n")], [("err", " 2%\n"), ("out", "a\n")]),
        ([("err", "\r 1%\n"), ("out", "a\n"), ("err", "\r 2%")], [("err", " 1%\n"), ("out", "a\n"), ("err", " 2%")]),
    ],
)
def test_outputs_of_one_stream_are_joined(messages, result):
    assert joined(*messages) == result


def test_a_cell_does_not_go_on_in_the_outputs_of_another_or_in_those_that_were_cleared():
    streams = Streams()
    for _ in range(2):
        outputs = [new_output("stream", name="stderr", text="\r 1%")]
        streams.join(outputs)
        assert [output.text for output in outputs] == [" 1%"]
