"""When an image is built, without building one."""

from pathlib import Path

from hbm_e2e.images import inputs_digest

DOCKERFILE = "FROM base\nCOPY room ./\nCOPY single /\n"


def context(folder: Path) -> Path:
    (folder / "room" / "inner").mkdir(parents=True)
    (folder / "room" / "inner" / "a.py").write_text("a = 1\n")
    (folder / "single").write_text("one\n")
    (folder / "elsewhere").write_text("anything\n")
    return folder


def test_only_what_goes_in_counts(tmp_path: Path) -> None:
    place = context(tmp_path)
    before = inputs_digest(DOCKERFILE, place, {})
    (place / "elsewhere").write_text("another thing\n")
    (place / "room" / "__pycache__").mkdir()
    (place / "room" / "__pycache__" / "a.pyc").write_bytes(b"compiled")
    (place / "room" / "inner" / "a.py").touch()
    assert inputs_digest(DOCKERFILE, place, {}) == before


def test_whatever_goes_in_counts(tmp_path: Path) -> None:
    place = context(tmp_path)
    seen = {inputs_digest(DOCKERFILE, place, {}), inputs_digest(DOCKERFILE, place, {"X": "1"})}
    seen.add(inputs_digest(DOCKERFILE + "RUN true\n", place, {}))
    (place / "room" / "inner" / "a.py").write_text("a = 2\n")
    seen.add(inputs_digest(DOCKERFILE, place, {}))
    (place / "single").chmod(0o755)
    seen.add(inputs_digest(DOCKERFILE, place, {}))
    (place / "room" / "inner" / "a.py").rename(place / "room" / "b.py")
    seen.add(inputs_digest(DOCKERFILE, place, {}))
    assert len(seen) == 6
