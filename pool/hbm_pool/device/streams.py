"""Fences for CUDA: host spans first, then events on the streams that the lane has used."""

from __future__ import annotations

import threading

import torch

from hbm_pool.host.fences import EpochClock, Fence, Lane


class StreamFence:
    """Done when the spans before it have ended and the streams have passed that point.

    The events are recorded once the spans have ended: only then is all their work queued.
    """

    def __init__(self, spans: Fence, clock: StreamClock, lane: Lane) -> None:
        self._spans: Fence | None = spans
        self._clock = clock
        self._lane = lane
        self._events: list[torch.cuda.Event] = []

    def done(self) -> bool:
        if self._spans is not None:
            if not self._spans.done():
                return False
            self._events = self._clock.record(self._lane)
            self._spans = None
        self._events = [
            event
            for event in self._events
            if not event.query()  # type: ignore[no-untyped-call]
        ]
        return not self._events


class StreamClock(EpochClock):
    """An epoch clock whose spans leave work behind on CUDA streams.

    `end` is called on the stream that holds the span's work.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._streams_lock = threading.Lock()
        self._streams: tuple[set[torch.cuda.Stream], set[torch.cuda.Stream]] = (set(), set())
        self._last: list[torch.cuda.Stream | None] = [None, None]

    def end(self, lane: Lane, epoch: int) -> None:
        self._note(lane)
        super().end(lane, epoch)

    def fence(self, lane: Lane) -> Fence:
        return StreamFence(super().fence(lane), self, lane)

    def order(self, lane: Lane) -> None:
        before = self._note(lane)
        if before is not None:
            torch.cuda.current_stream(self._device).wait_stream(before)

    def record(self, lane: Lane) -> list[torch.cuda.Event]:
        """One event on every stream the lane has used, recorded now."""
        with self._streams_lock:
            streams = list(self._streams[lane])
        events = []
        for stream in streams:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            events.append(event)
        return events

    def _note(self, lane: Lane) -> torch.cuda.Stream | None:
        """Remembers the caller's stream; returns the one used before it if it was another."""
        stream = torch.cuda.current_stream(self._device)
        with self._streams_lock:
            before = self._last[lane]
            if before == stream:
                return None
            self._streams[lane].add(stream)
            self._last[lane] = stream
            return before
