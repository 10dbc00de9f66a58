"""Files that are complete or absent, and digests."""

from __future__ import annotations

import pytest

from molsaki.io import atomic_write, digest, hash64, read_json_lines, write_json, write_json_lines


@pytest.mark.parametrize("binary", [False, True])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, binary):
    path, half, whole = tmp_path / "f", *((b"half", b"whole") if binary else ("half\u00e9", "whole\u00e9"))
    with pytest.raises(KeyboardInterrupt), atomic_write(path, binary) as file:
        file.write(half)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with atomic_write(path, binary) as file:
        file.write(whole)
        assert not path.exists()
    assert path.read_bytes() == (whole if binary else whole.encode())
    with pytest.raises(OSError), atomic_write(path, binary) as file:
        file.write(half)
        raise OSError("disk full")
    assert path.read_bytes() == (whole if binary else whole.encode()) and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "f"):
        pass


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1]}, indent=1)
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1\n ]\n}\n'
    write_json_lines(tmp_path / "b.jsonl", [{"t": "\u00e9\n"}, 2])
    assert (tmp_path / "b.jsonl").read_bytes() == '{"t": "\u00e9\\n"}\n2\n'.encode()
    records = [
        {"t": "\u00e9\n"},
        2,
        "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh\ri",
    ]  # str.splitlines splits
    write_json_lines(tmp_path / "b.jsonl", records)
    assert read_json_lines(tmp_path / "b.jsonl") == records


def test_digests():
    """Committed values: stores and journals on disk hold them."""
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) == "5557ca5de2b3571afbdd93bfcaf09bdb"
    assert digest({"b": 1, "a": 2}, sort_keys=False) != digest({"a": 2, "b": 1}, sort_keys=False)
    assert hash64("p0") == -8250987409315237900
