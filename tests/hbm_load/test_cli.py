from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hbm_load.records import Outcome, Records

RUN = [sys.executable, "-m", "hbm_load"]


def test_a_run_writes_records_and_progress_lines(tmp_path: Path, unused_port: int) -> None:
    path = tmp_path / "records.parquet"
    done = subprocess.run(
        [
            *(*RUN, "--url", f"http://127.0.0.1:{unused_port}", "--records", str(path)),
            *("--seconds", "1", "--progress-s", "0.2"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    records = Records.read(path)
    assert lines[-1]["finished"] == lines[-1]["total"] == len(records)
    assert lines[-1]["errors"] == len(records)
    assert lines[-1]["tail_ms"] is None
    assert set(records.outcome) == {Outcome.REFUSED}
    assert records.meta["start_monotonic_ns"] > 0


async def test_a_run_against_a_server_records_its_answers(tmp_path: Path, serve_on) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(line for line in head.split("\r\n") if "content-length" in line)
            await reader.readexactly(int(length.split(": ")[1]))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n" + b'{"scores":[1]}')

    path = tmp_path / "records.parquet"
    async with serve_on(handler) as port:
        flags = ["--url", f"http://127.0.0.1:{port}", "--records", str(path), "--seconds", "1"]
        process = await asyncio.create_subprocess_exec(*RUN, *flags)
        assert await process.wait() == 0
    records = Records.read(path)
    assert records.ok.all()
    assert all(scores == [1.0] for scores in records.scores.values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--url", "nonsense"], "not of the form"),
        (["--url", "http://a:1", "--scenario", "nowhere.yaml"], "cannot be read"),
        (["--url", "http://a:1", "--trace", "nowhere.csv"], "cannot be read"),
        (["--url", "http://a:1", "--trace", "x.csv", "--columns", "a,b"], "name three"),
    ],
)
def test_bad_input_exits_2_with_one_line(tmp_path: Path, flags: list[str], said: str) -> None:
    done = subprocess.run(
        [*RUN, "--records", str(tmp_path / "r.parquet"), *flags], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
