"""What `hbm advise` writes: a policy as YAML, and one HTML page that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import yaml
from hbm_pool.host.plan import MemoryPlan

from hbm_study.advise import Advice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CSS = """
body { margin: 0 auto; max-width: 56rem; padding: 1.5rem 1rem 3rem; color: #1d2329;
  font: 16px/1.5 system-ui, sans-serif; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #d9dee3; }
.verdict { font-size: 1.15rem; border-left: .3rem solid #0b6e99; padding: .4rem .8rem; }
.soft { color: #5b6670; font-size: .9rem; } svg { width: 100%; height: auto; }
pre { background: #f4f6f8; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
"""


def policy_yaml(advice: Advice, name: str) -> str:
    """An HBMPolicy that does what the advice says."""
    alpha = round(advice.recommended, 3)
    spec: dict[str, Any] = {"selector": {"matchLabels": {"app": name}}}
    if advice.pays:
        low, high = float(advice.alpha.min()), float(advice.alpha.max())
        bounds = {"min": round(low, 3), "max": round(high, 3), "initial": alpha}
        spec |= {"mode": "Auto", "alpha": bounds}
    else:
        spec |= {"mode": "Fixed", "alpha": {"fixed": alpha}}
    spec["slo"] = {"latencyMs": round(advice.slo_ms, 1)}
    policy = {
        "apiVersion": "hbm-partition.io/v1alpha1",
        "kind": "HBMPolicy",
        "metadata": {"name": name},
        "spec": spec,
    }
    return f"# {advice.verdict()}\n{yaml.safe_dump(policy, sort_keys=False, allow_unicode=True)}"


def page(advice: Advice, plan: MemoryPlan, title: str, notes: Sequence[str]) -> str:
    """The whole page."""
    parts = "".join(
        _row(name, f"{best.alpha:.2f}", f"{best.plateau_low:.2f} to {best.plateau_high:.2f}")
        for name, best in advice.by_part.items()
    )
    sizes = "".join(
        _row(
            f"{each.alpha:.2f}",
            f"{each.emb_bytes / 1e9:.2f}",
            f"{each.kv_bytes / 1e9:.2f}",
            f"{sum(rows.rows for rows in each.rows):,}",
            f"{each.users:,}",
            "yes" if each.pins_fit else "no",
        )
        for each in plan.alphas
    )
    yaml_text = policy_yaml(advice, "rank")
    service = advice.best_service
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{_CSS}</style>
<h1>{escape(title)}</h1>
<p class="verdict">{escape(advice.verdict())}</p>
<p>Best static α: <b>{advice.recommended:.2f}</b> (by mean service
{service.alpha:.2f}, within 1 % from {service.plateau_low:.2f} to {service.plateau_high:.2f}; by
P99 {advice.best_tail.alpha:.2f}). Share of requests within {advice.slo_ms:.1f} ms:
{100 * advice.slo_static:.2f} % fixed, {100 * advice.slo_adaptive:.2f} % adapting.</p>
<p class="soft">{advice.requests:,} requests counted at {advice.qps:.1f} per second. Simulated
from the log; intervals are 95 %, over resampled stretches of it. {escape(" ".join(notes))}</p>
<h2>Every static α</h2>{_static_plot(advice)}
<h2>α over time, adapting</h2>{_time_plot(advice)}
<p class="soft">{advice.moved_bytes / 1e9:.2f} GB changed sides; mean service time
{100 * advice.service_change.mean:+.2f} % against the best static α.</p>
<h2>Best α in each part of the log</h2>
<table>{_row("part", "α*", "within 1 %", head=True)}{parts}</table>
<h2>Memory</h2>
<p class="soft">{plan.num_extents:,} extents of {plan.extent_bytes / 1024:,.0f} KiB,
{plan.pool_bytes / 1e9:.2f} GB; users with a history of {plan.history_tokens:,} tokens.</p>
<table>{_row("α", "rows, GB", "KV, GB", "rows", "users", "batches fit", head=True)}{sizes}</table>
<h2>Recommended policy</h2><pre>{escape(yaml_text)}</pre>
</html>
"""


def _row(*cells: str, head: bool = False) -> str:
    tag = "th" if head else "td"
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _static_plot(advice: Advice) -> str:
    def draw(axes: Axes) -> None:
        axes.plot(advice.alpha, advice.tail_ms, "o-", ms=3, label="P99")
        axes.plot(advice.alpha, advice.service_ms, "s-", ms=3, label="mean service time")
        axes.axhline(advice.adaptive_tail_ms, ls="--", lw=1, label="P99, adapting")
        axes.axvline(advice.recommended, color="#a32638", lw=1, ls=":")
        axes.set(xlabel="α", ylabel="ms", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")

    return _svg(draw)


def _time_plot(advice: Advice) -> str:
    def draw(axes: Axes) -> None:
        axes.plot(advice.time_s, advice.alpha_over_time, label="α")
        axes.plot(advice.time_s, advice.anchor_over_time, lw=0.8, ls=":", label="α̂ of the twin")
        axes.set(xlabel="time, s", ylabel="α", ylim=(0, 1))

    return _svg(draw)


def _svg(draw: Any) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hbm"}):
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().split("?>", 1)[1].split(">", 1)[1]
