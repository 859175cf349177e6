"""The report of `cinecat engines accept` as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from cinecat.engines.backends.acceptance import DIFFUSERS, Acceptance, BackendReport, Timing
from cinecat.engines.backends.choice import TORCH

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.passed { color: #176b2c } .failed { color: #a3130f; font-weight: 600 } .missing { color: #666 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dt { color: #666 } dd { margin: 0 }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } th, td { border-color: #444 } dt, .missing { color: #999 }
  .passed { color: #6fcf86 } .failed { color: #ff8a84 }
}
"""


def page(acceptance: Acceptance) -> str:
    """HTML, all that others wrote in it escaped."""
    verdict = "accepted" if acceptance.accepted else "not accepted"
    state = "passed" if acceptance.accepted else "failed"
    parts = [
        f'<h1>Cinecat engines: <span class="{state}">{verdict}</span></h1>',
        "<p>Every backend that can run on this machine was built, compared with diffusers over the same weights, and "
        "timed beside it.</p>",
        _list(acceptance.config),
        _table(
            ("Backend", "Verdict", "Largest error", "Against diffusers", "Against torch", "Build"),
            _verdicts(acceptance),
        ),
        "<p>Times are of one step for one plain row, ours over the other's: the medians over interleaved pairs at the "
        "sizes below, from the best to the worst; less than 1 is faster.</p>",
        *map(_details, acceptance.backends),
        "<h2>Machine</h2>",
        _list(acceptance.machine),
        "<h2>Versions</h2>",
        _list(acceptance.versions),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Cinecat engines: '
        f'{verdict}</title><meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def verdict(backend: BackendReport) -> str:
    """What became of a backend, in a line."""
    if backend.state != "passed":
        return backend.message
    return f"parity ok in {len(backend.outcomes)} cases"


def largest_error(backend: BackendReport) -> str:
    """Over all cases, with what is allowed; empty where none was run."""
    if not backend.outcomes:
        return ""
    # A NaN is worse than any number.
    worst = max(backend.outcomes, key=lambda outcome: (outcome.error != outcome.error, outcome.error))
    return f"{worst.error:.1e} of {worst.tolerance:.0e}"


def speed(backend: BackendReport, rival: str) -> str:
    """Median seconds over a rival's on the uniform path, the best size and the worst; empty where not measured."""
    ratios = [
        timing.ratio(backend.name, rival)[1]
        for timing in backend.timings
        if timing.path == "uniform" and rival != backend.name
    ]
    if not ratios:
        return ""
    return f"{min(ratios):.2f}" if len(ratios) == 1 else f"{min(ratios):.2f} to {max(ratios):.2f}"


def _verdicts(acceptance: Acceptance) -> Iterable[tuple[str, ...]]:
    for backend in acceptance.backends:
        built = f"{backend.build_seconds:.0f} s, {backend.size_bytes / 2**20:.0f} MiB" if backend.size_bytes else ""
        yield (
            escape(backend.name),
            f'<span class="{backend.state}">{escape(backend.state)}</span>: {escape(verdict(backend))}',
            largest_error(backend),
            speed(backend, DIFFUSERS),
            speed(backend, TORCH),
            built,
        )


def _details(backend: BackendReport) -> str:
    if not backend.outcomes:
        return ""
    cases = (
        (
            escape(str(outcome.case)),
            f"{outcome.error:.1e}",
            f"{outcome.tolerance:.0e}",
            "ok" if outcome.passed else '<span class="failed">wrong</span>',
        )
        for outcome in backend.outcomes
    )
    times = (
        (escape(timing.size), timing.path, str(timing.tokens), escape(side), _milliseconds(timing, side))
        for timing in backend.timings
        for side in timing.seconds
    )
    return "\n".join(
        (
            f"<h2>{escape(backend.name)}</h2>",
            _list(backend.versions),
            _table(("Case", "Error", "Allowed", ""), cases),
            _table(("Size", "Path", "Tokens", "Side", "Step: median (quartiles)"), times),
        )
    )


def _milliseconds(timing: Timing, side: str) -> str:
    low, median, high = (1000 * value for value in timing.quartiles(side))
    return f"{median:.1f} ms ({low:.1f} to {high:.1f})"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "\n".join(
        "<tr>" + "".join(f'<td class="{"number" if cell[:1].isdigit() else ""}">{cell}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _list(entries: Mapping[str, object]) -> str:
    items = (
        f"<dt>{escape(name)}</dt><dd>{escape(', '.join(value) if isinstance(value, list) else str(value))}</dd>"
        for name, value in entries.items()
    )
    return f"<dl>{''.join(items)}</dl>"
