"""What a run prints, as a terminal shows it: a progress bar is one line of one output, however often it is redrawn."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

STEPS = re.compile(r"\n|\r|\x1b\[A|[^\n\r\x1b]+|\x1b")  # what a text is made of; \x1b[A goes up, as nested bars do


class Screen:
    """The lines of one stream and the place in them where the next text is written."""

    def __init__(self):
        self.lines, self.row, self.column = [""], 0, 0

    def write(self, text: str) -> None:
        """Write a text at this place, over what is there."""
        for part in STEPS.findall(text):
            if part == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row == len(self.lines))
            elif part == "\r":
                self.column = 0
            elif part == "\x1b[A":
                self.row = max(self.row - 1, 0)
            else:
                line, end = self.lines[self.row].ljust(self.column), self.column + len(part)
                self.lines[self.row], self.column = line[: self.column] + part + line[end:], end

    @property
    def text(self) -> str:
        """All that is shown."""
        return "\n".join(self.lines)


class Streams:
    """Joins the outputs of streams of a cell while it runs.

    What is printed goes to the output before it where that is of the same stream; a bar that goes on after something
    else was shown goes on in the output where it began.
    """

    def __init__(self):
        self._last: dict[str, tuple[NotebookNode, Screen]] = {}  # by stream, of the cell that is running

    def join(self, outputs: "list[NotebookNode]") -> None:
        """Join the output that came last, one of a stream, to an earlier one, or let it begin a new screen.

        Args:
            outputs: Those of the cell, in their order; changed in place.
        """
        *before, output = outputs
        earlier, screen = self._last.get(output.name, (None, Screen()))
        redrawn = output.text.startswith(("\r", "\n")) and screen.lines[-1]
        if not before or not (before[-1] is earlier or (redrawn and any(earlier is one for one in before))):
            earlier, screen = output, Screen()
            self._last[output.name] = earlier, screen
        else:
            outputs.pop()
        screen.write(output.text)
        earlier.text = screen.text
