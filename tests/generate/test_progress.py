"""The bar shows itself on a terminal only, and goes when the prompt is read."""

import sys

from routing_jax.generate.progress import PrefillBar


def test_a_terminal_gets_a_bar_and_a_file_nothing(monkeypatch, capsys):
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with PrefillBar() as bar:
            for done in range(4):
                bar.show(done, 3)
            bar.show(0, 3)  # the next wave of prompts
        said = capsys.readouterr()
        assert said.out == ""
        assert ("reading the prompt" in said.err) == terminal
        assert ("0/3" in said.err) == terminal  # from its first frame on
        assert "0/100" not in said.err
