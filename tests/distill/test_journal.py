"""The journal of replies: read again after an interruption, refused if it is damaged or of something else."""

from __future__ import annotations

import pytest

from molsaki.annotation.journal import ReplyJournal
from molsaki.evaluation.generate import Reply


def test_replies_are_read_again(tmp_path):
    path = tmp_path / "w.jsonl"
    journal = ReplyJournal(path, {"seed": 1})
    journal.put(1, 0, [("é", 1)], [Reply("a\nb", True)])
    path.write_bytes(path.read_bytes() + b'{"check"')
    again = ReplyJournal(path, {"seed": 1})
    assert again.get(1, 0, [("é", 1)]) == [Reply("a\nb", True)]
    assert again.get(1, 1, [("é", 1)]) is None
    assert path.read_bytes().endswith(b"]}\n")
    with pytest.raises(ValueError, match="batch 0 of phase 1 has other examples"):
        again.get(1, 0, [("f", 1)])
    path.write_text('{"not": "ours"}\n')
    with pytest.raises(ValueError, match="w.jsonl:1: damaged, or not a journal of replies"):
        ReplyJournal(path, {"seed": 1})
    assert path.read_text() == '{"not": "ours"}\n'
