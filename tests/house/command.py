"""The command line as a user meets it: a status, and where it is not 0 one line."""

from __future__ import annotations

from aadkern_train.cli import main


def answer(words: list[str], capsys) -> tuple[int, str]:
    """The status of a command line, and the line that it says."""
    capsys.readouterr()
    try:
        status = main(words)
    except SystemExit as end:  # of argparse
        status = int(end.code or 0)
    said = capsys.readouterr().err.splitlines()
    if status == 0:
        return status, "\n".join(said)
    assert len(said) == 1 and said[0].startswith("aad"), (words, said)
    return status, said[0]
