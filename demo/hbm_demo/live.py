"""What the terminal shows while the demo runs: a live view, or plain lines where there is none."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hbm_demo.observe import NodeSample
from hbm_demo.system import Arm

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_HISTORY: Final = 40
_PLAIN_EVERY_S: Final = 5.0
_RATE_LOOKS: Final = 50
"""Looks at a node behind its hit rates: about ten seconds."""


class LiveView:
    """A rich live view on a terminal; every few seconds a line where the output is none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._said = ""
        self._alphas: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_HISTORY))
        self._past: dict[str, deque[NodeSample]] = defaultdict(lambda: deque(maxlen=_RATE_LOOKS))
        self._next_plain_s = 0.0
        self._next_point_s = 0.0
        if console.is_terminal:
            self._live = Live(
                Text("starting"), console=console, refresh_per_second=4, transient=True
            )
            self._live.start()

    def close(self) -> None:
        """Gives the terminal back; from any thread."""
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line about what is going on."""
        self._said = text
        self._alphas.clear()
        self._past.clear()
        if self._live is None:
            self._console.print(text, highlight=False, soft_wrap=True)
        else:
            self._live.update(Panel(Text(text), title="HBM Partition", title_align="left"))

    def update(
        self, arm: Arm, progress: dict[str, Any] | None, samples: Sequence[NodeSample]
    ) -> None:
        """The newest state of the running arm."""
        now_s = time.monotonic()
        for sample in samples:
            self._past[sample.node].append(sample)
        if now_s >= self._next_point_s:
            self._next_point_s = now_s + 1.0
            for sample in samples:
                self._alphas[sample.node].append(sample.alpha)
        if self._live is not None:
            self._live.update(self._panel(arm, progress, samples))
        elif progress is not None and now_s >= self._next_plain_s:
            self._next_plain_s = now_s + _PLAIN_EVERY_S
            line = plain_line(arm, progress, samples)
            self._console.print(line, highlight=False, soft_wrap=True)

    def _panel(
        self, arm: Arm, progress: dict[str, Any] | None, samples: Sequence[NodeSample]
    ) -> RenderableType:
        parts: list[RenderableType] = [Text(self._said, style="dim")]
        if progress is not None:
            parts += [_bar(progress), _latencies(progress)]
        parts.append(self._nodes(progress, samples))
        return Panel(
            Group(*parts), title=f"HBM Partition: {arm.title}", title_align="left", width=96
        )

    def _nodes(self, progress: dict[str, Any] | None, samples: Sequence[NodeSample]) -> Table:
        table = Table(box=None, pad_edge=False, expand=True)
        for heading in ("node", "α", "α̂", "α, last 40 s"):
            table.add_column(heading)
        for heading in ("KV hits", "EMB hits", "refill", "queue", "routed"):
            table.add_column(heading, justify="right")
        routed = (progress or {}).get("nodes", {})
        for sample in samples:
            table.add_row(
                sample.node,
                f"{sample.alpha:.3f}",
                _number(sample.anchor, "{:.3f}"),
                Text(sparkline(self._alphas[sample.node]), style="cyan"),
                _percent(_ratio(self._past[sample.node], "kv_hits", "kv_lookups")),
                _percent(1.0 - _ratio(self._past[sample.node], "emb_misses", "emb_accesses")),
                f"{sample.counters['refill_bytes'] / 1e6:.1f} MB",
                f"{sample.queue_depth:.0f}",
                str(routed.get(sample.node, 0)),
            )
        return table


def plain_line(arm: Arm, progress: dict[str, Any], samples: Sequence[NodeSample]) -> str:
    """One line with everything the live view shows."""
    nodes = " ".join(
        f"{sample.node}: α {sample.alpha:.2f} α̂ {_number(sample.anchor, '{:.2f}')} "
        f"refill {sample.counters['refill_bytes'] / 1e6:.1f} MB "
        f"routed {progress['nodes'].get(sample.node, 0)};"
        for sample in samples
    )
    return (
        f"{arm.name} {progress['regime']} {progress['finished']}/{progress['total']} "
        f"P50 {_number(progress['p50_ms'], '{:.1f}')} ms "
        f"P{progress['tail_percentile']} {_number(progress['tail_ms'], '{:.1f}')} ms "
        f"SLO {_percent(progress['slo_attainment'])} KV {_percent(progress['kv_hit_rate'])} "
        f"EMB {_percent(progress['emb_hit_rate'])} errors {progress['errors']} "
        f"dropped {progress['dropped']} | {nodes.rstrip(';')}"
    )


def sparkline(values: Sequence[float]) -> str:
    """Values of 0..1 as a row of blocks."""
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[min(top, max(0, round(value * top)))] for value in values)


def _bar(progress: dict[str, Any]) -> Table:
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    row.add_row(
        ProgressBar(total=progress["total"], completed=progress["finished"]),
        f"{progress['regime']}  {progress['finished']}/{progress['total']}",
    )
    return row


def _latencies(progress: dict[str, Any]) -> Text:
    text = Text()
    for label, value in (
        ("P50", _number(progress["p50_ms"], "{:.1f} ms")),
        (f"P{progress['tail_percentile']}", _number(progress["tail_ms"], "{:.1f} ms")),
        ("SLO met", _percent(progress["slo_attainment"])),
        ("KV hits", _percent(progress["kv_hit_rate"])),
        ("EMB hits", _percent(progress["emb_hit_rate"])),
        ("in flight", str(progress["in_flight"])),
    ):
        text.append(f"{label} ", style="dim")
        text.append(f"{value}  ")
    failed = progress["errors"] + progress["dropped"]
    text.append("errors and drops ", style="dim")
    text.append(str(failed), style="bold red" if failed else "green")
    return text


def _ratio(past: Sequence[NodeSample], part: str, whole: str) -> float:
    """Growth of one counter over that of another, between the oldest and the newest look."""
    first, last = past[0].counters, past[-1].counters
    total = last[whole] - first[whole]
    return (last[part] - first[part]) / total if total > 0 else math.nan


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else form.format(value)


def _percent(value: float | None) -> str:
    return _number(None if value is None else value * 100, "{:.1f} %")
