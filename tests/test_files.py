"""Durable changes of files, from several threads at once (a notebook may watch the run that it executes)."""

from concurrent.futures import ThreadPoolExecutor

from kdcore import files

ROUNDS = 50


def _fill(path, letter):
    with files.appearing(path) as temporary:
        temporary.write_bytes(letter * 10_000)


def _run(path, change):
    def rounds(letter):
        for _ in range(ROUNDS):
            change(path, letter)
            assert path.read_bytes() in (b"a" * 10_000, b"b" * 10_000, b"c" * 10_000)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(rounds, (b"a", b"b", b"c")))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_threads_replace_one_file(tmp_path):
    _run(tmp_path / "page", lambda path, letter: files.replace_file(path, letter * 10_000))


def test_a_file_appears_from_several_threads(tmp_path):
    _run(tmp_path / "page", _fill)
