from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from hbm_load.client import LoadClient, LoadConfig
from hbm_load.errors import ClientError
from hbm_load.generate import generate
from hbm_load.progress import ProgressCounter
from hbm_load.records import Outcome, Records
from hbm_load.scenario import Scenario
from hbm_load.trace import Trace
from hbm_pool.contracts import headers


@pytest.fixture
def trace(scenario: Scenario) -> Trace:
    """About 200 requests within two seconds."""
    return generate(scenario, 1, duration_s=2.0, rate_scale=2.0)


async def read_request(reader: asyncio.StreamReader) -> tuple[dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
    return fields, await reader.readexactly(int(fields["content-length"]))


def answer(scores: list[float], status: str = "200 OK", extra: str = "") -> bytes:
    body = json.dumps({"scores": scores}).encode()
    return f"HTTP/1.1 {status}\r\n{extra}content-length: {len(body)}\r\n\r\n".encode() + body


async def test_every_request_is_sent_as_the_trace_says(trace: Trace, serve_on) -> None:
    got: dict[str, tuple[dict[str, str], dict]] = {}

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            fields, body = await read_request(reader)
            got[fields[headers.REQUEST_ID]] = (fields, json.loads(body))
            extra = (
                f"X-HBM-Node: n{len(got) % 2}\r\nX-HBM-KV-Reused-Tokens: 16\r\n"
                "X-HBM-Rows-Looked-Up: 10\r\nX-HBM-Rows-Missed: 4\r\nX-HBM-Alpha: 0.5\r\n"
            )
            writer.write(answer([0.5] * 8, extra=extra))

    async with serve_on(handler) as port:
        config = LoadConfig(url=f"http://127.0.0.1:{port}", sample_share=0.1)
        client = LoadClient(trace, config)
        counter = ProgressCounter(client.records, slo_ms=1e9)
        client._on_done = counter.done
        records = await client.run()

    assert records.ok.all()
    assert len(got) == len(trace) == len(set(records.request_id))
    for index in (0, len(trace) // 2, len(trace) - 1):
        fields, body = got[records.request_id[index]]
        request = trace.request(index)
        assert fields[headers.USER_ID] == request.user_id
        assert fields[headers.HISTORY_TOKENS] == str(len(request.items))
        assert body["history"]["items"] == request.items.tolist()
        assert body["history"]["timestamps"] == request.timestamps.tolist()
        assert body["candidates"] == request.candidates.tolist()
        assert body["query_time"] == request.query_time
    assert 0 < len(records.scores) < len(trace)
    assert all(scores == [0.5] * 8 for scores in records.scores.values())
    progress = counter.snapshot(client.in_flight)
    assert progress.finished == progress.total == len(trace)
    assert progress.kv_hit_rate == 1.0
    assert progress.emb_hit_rate == pytest.approx(0.6)
    assert progress.slo_attainment == 1.0
    assert progress.tail_percentile == 95
    assert sum(progress.nodes.values()) == len(trace)


async def test_a_stall_shows_in_every_request_it_delays(trace: Trace, serve_on) -> None:
    """No coordinated omission: a server that stops for 600 ms delays all that was due then."""
    stalled_until = 0.0
    served = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal stalled_until, served
        loop = asyncio.get_running_loop()
        while True:
            await read_request(reader)
            served += 1
            if served == 50:
                stalled_until = loop.time() + 0.6
            await asyncio.sleep(max(0.0, stalled_until - loop.time()))
            writer.write(answer([1.0]))

    async with serve_on(handler) as port:
        records = await LoadClient(trace, LoadConfig(f"http://127.0.0.1:{port}")).run()

    assert records.ok.all()
    # The stall began when the 50th request was read; what was due in its first 400 ms waited for
    # the rest of it, so at least 200 ms.
    begin = records.sent_s[np.argsort(records.sent_s)[49]]
    during = (records.intended_s >= begin + 0.05) & (records.intended_s < begin + 0.4)
    assert during.sum() > 10
    assert (records.latency_ms[during] >= 190).all()
    # And the generator did not wait for answers: all of it left before the stall was over.
    assert records.sent_s[during].max() < records.done_s[during].min()


async def test_latency_counts_from_the_intended_time(trace: Trace, serve_on) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(answer([1.0]))

    async with serve_on(handler) as port:
        records = await LoadClient(trace, LoadConfig(f"http://127.0.0.1:{port}")).run()
    np.testing.assert_allclose(records.latency_ms, (records.done_s - records.intended_s) * 1e3)
    assert (records.sent_s >= records.intended_s).all()
    np.testing.assert_array_equal(records.intended_s, trace.time_s)


async def test_a_server_that_dies_and_returns_costs_only_its_own_requests(
    trace: Trace, serve_on
) -> None:
    writers: set[asyncio.StreamWriter] = set()
    dead = False
    served = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served, dead
        writers.add(writer)
        while True:
            await read_request(reader)
            served += 1
            dead = 60 <= served < 90
            if dead:
                writer.transport.abort()
                return
            writer.write(answer([1.0]))

    async with serve_on(handler) as port:
        records = await LoadClient(trace, LoadConfig(f"http://127.0.0.1:{port}")).run()
    lost = [outcome for outcome in records.outcome if outcome is Outcome.LOST]
    assert len(lost) == 30
    assert records.ok.sum() == len(trace) - 30


async def test_a_dead_target_refuses_and_the_run_still_ends(trace: Trace, unused_port) -> None:
    records = await LoadClient(trace, LoadConfig(f"http://127.0.0.1:{unused_port}")).run()
    assert set(records.outcome) == {Outcome.REFUSED}
    assert np.isnan(records.latency_ms).all()


async def test_a_silent_server_times_out_and_excess_is_dropped(trace: Trace, serve_on) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async with serve_on(handler) as port:
        config = LoadConfig(f"http://127.0.0.1:{port}", timeout_s=0.3, max_in_flight=10)
        records = await LoadClient(trace, config).run()
    outcomes = [str(outcome) for outcome in records.outcome]
    assert set(outcomes) == {"timeout", "dropped"}
    assert outcomes.count("dropped") > 0
    assert np.isnan(records.done_s).all()


async def test_errors_and_nonsense_are_told_apart(trace: Trace, serve_on) -> None:
    count = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        while True:
            await read_request(reader)
            count += 1
            if count % 3 == 0:
                writer.write(answer([], status="503 Service Unavailable"))
            elif count % 3 == 1:
                writer.write(b"this is not HTTP\r\n\r\n")
            else:
                writer.write(answer([1.0]))

    async with serve_on(handler) as port:
        records = await LoadClient(trace, LoadConfig(f"http://127.0.0.1:{port}")).run()
    for outcome in (Outcome.STATUS, Outcome.LOST, Outcome.OK):
        assert records.outcome.count(outcome) >= len(trace) // 3 - 1
    refused = [i for i, outcome in enumerate(records.outcome) if outcome is Outcome.STATUS]
    assert set(records.status[refused].tolist()) == {503}


async def test_stopping_early_leaves_the_rest_unsent(trace: Trace, serve_on) -> None:
    stop = asyncio.Event()
    served = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        while True:
            await read_request(reader)
            served += 1
            writer.write(answer([1.0]))
            if served == 20:
                stop.set()

    async with serve_on(handler) as port:
        records = await LoadClient(trace, LoadConfig(f"http://127.0.0.1:{port}")).run(stop)
    assert 20 <= records.ok.sum() < len(trace)
    assert records.outcome.count(Outcome.NOT_SENT) == len(trace) - records.ok.sum()


async def test_records_survive_parquet(trace: Trace, serve_on, tmp_path: Path) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(answer([0.25, -1.5], extra="x-hbm-node: a\r\nx-hbm-alpha: 0.4\r\n"))

    async with serve_on(handler) as port:
        config = LoadConfig(f"http://127.0.0.1:{port}", sample_share=0.05)
        records = await LoadClient(trace, config, meta={"why": "test"}).run()
    records.write(tmp_path / "records.parquet")
    back = Records.read(tmp_path / "records.parquet")
    assert back.scores == records.scores
    assert back.outcome == records.outcome
    assert back.texts == records.texts
    assert back.meta == records.meta
    assert back.labels == records.labels
    np.testing.assert_array_equal(back.latency_ms, records.latency_ms)
    np.testing.assert_array_equal(back.regime, records.regime)
    np.testing.assert_array_equal(back.numbers["alpha"], records.numbers["alpha"])


async def test_a_path_in_the_address_goes_before_that_of_the_request(
    trace: Trace, serve_on
) -> None:
    asked: list[bytes] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            asked.append(await reader.readline())
            await read_request(reader)
            writer.write(answer([0.5] * 8))

    async with serve_on(handler) as port:
        records = await LoadClient(trace, LoadConfig(f"http://127.0.0.1:{port}/proxy/")).run()
    assert records.ok.all()
    assert set(asked) == {b"POST /proxy/v1/rank HTTP/1.1\r\n"}


@pytest.mark.parametrize("url", ["127.0.0.1:80", "https://a", "http://", "x"])
def test_a_bad_address_is_refused_before_anything_is_sent(trace: Trace, url: str) -> None:
    with pytest.raises(ClientError, match="not of the form http://host:port"):
        LoadClient(trace, LoadConfig(url))
