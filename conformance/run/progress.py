"""conformance, progress: how far each subject is, and the time to go, on a terminal."""

import sys

from conformance.core.register import REQUIREMENTS


class Progress:
    """A bar for each subject that is judged; nothing but a line for each where standard error is no terminal.

    With tqdm, which many have for other reasons; without it one line of counts.
    """

    def __init__(self):
        self.bars: dict = {}
        self.is_terminal = sys.stderr.isatty()
        try:
            from tqdm import tqdm
        except ImportError:
            tqdm = None
        self.tqdm = tqdm if self.is_terminal else None

    def say(self, line: str) -> None:
        """A line where there is no bar."""
        if not self.is_terminal:
            print(line, file=sys.stderr, flush=True)

    def update(self, running: list[tuple[str, int, float]]) -> None:
        """(subject, requirements judged, seconds) of each that runs."""
        if self.tqdm is None:
            if self.is_terminal and running:
                line = "   ".join(f"{name} {done}/{len(REQUIREMENTS)}, {spent:.0f} s" for name, done, spent in running)
                print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
            return
        for name in self.bars.keys() - {name for name, _, _ in running}:
            self.bars.pop(name).close()
        for name, done, _ in running:
            if name not in self.bars:
                form = "{desc:<24} {bar} {n_fmt}/{total_fmt} {elapsed}, {remaining} to go"
                self.bars[name] = self.tqdm(total=len(REQUIREMENTS), desc=name, bar_format=form, leave=False)
            self.bars[name].update(done - self.bars[name].n)

    def clear(self) -> None:
        """Before something else is printed."""
        for bar in self.bars.values():
            bar.close()
        self.bars.clear()
        if self.is_terminal and self.tqdm is None:
            print("\r" + " " * 100 + "\r", end="", file=sys.stderr)
