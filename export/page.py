"""The report's page: style sheet and the few HTML elements it is made of. Everything that is given is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sparsec.export.words import Reading

STYLE = """
:root{color-scheme:light dark;--paper:#fafaf7;--raised:#fff;--ink:#1a2027;--muted:#5b6570;--line:#dde0df;
--kept:#0b6b74;--local:#77838f;--warn:#a4500a;--onkept:#fff}
@media (prefers-color-scheme:dark){:root{--paper:#11151a;--raised:#171c22;--ink:#e2e6ea;--muted:#97a3ae;--line:#2b333b;
--kept:#4dbdc0;--local:#7b8894;--warn:#e5a257;--onkept:#0d1518}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;
-webkit-text-size-adjust:100%;overflow-wrap:break-word}
main{max-width:960px;margin:0 auto;padding:56px 24px 72px}
h1,p{overflow-wrap:anywhere}
h1{font-size:30px;line-height:1.2;font-weight:600;letter-spacing:-.01em;margin:6px 0 10px}
h2{font-size:20px;line-height:1.3;font-weight:600;margin:0 0 14px}
h3{font-size:13px;font-weight:600;color:var(--muted);margin:30px 0 8px}
p{margin:0 0 14px;max-width:68ch}
section{border-top:1px solid var(--line);margin-top:56px;padding-top:26px}
a{color:var(--kept)}
.kicker{font-size:13px;color:var(--muted);margin:0}
.quiet,figcaption,dt,th,footer,summary{color:var(--muted);font-size:13px;line-height:1.5}
.verdict{margin:22px 0 0;max-width:76ch}
.verdict b{display:inline-block;background:var(--kept);color:var(--onkept);font-size:13px;line-height:1;padding:5px 9px;
margin-right:10px}
p.after{margin-top:14px}
.verdict.bad b{background:var(--warn)}
.caution{position:relative;padding:0 0 0 28px;margin:0 0 12px;max-width:72ch}
.caution::before{content:"!";position:absolute;left:0;top:3px;width:18px;height:18px;font-size:12px;font-weight:700;
line-height:18px;text-align:center;border-radius:50%;background:var(--warn);color:var(--onkept)}
.readings{display:grid;grid-template-columns:repeat(3,1fr);margin:32px 0 0;padding:0 1px 1px 0}
.readings div{background:var(--raised);border:1px solid var(--line);margin:0 -1px -1px 0;padding:16px 18px 14px}
.readings dd{margin:0}
.readings .value{font-size:25px;line-height:1.3;font-weight:600;letter-spacing:-.01em}
.readings .note{color:var(--muted);font-size:13px;line-height:1.45}
figure{margin:22px 0 18px}
figcaption{margin-top:12px;max-width:76ch}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;line-height:1.45;min-width:min(100%,520px);margin:6px 0 14px}
th,td{text-align:left;vertical-align:top;padding:6px 28px 6px 0;border-bottom:1px solid var(--line);font-weight:400}
td.num,th.num{text-align:right}
td.num{white-space:nowrap}
th{vertical-align:bottom}
.facts td.name{color:var(--muted);white-space:nowrap;overflow-wrap:normal}
.facts td{overflow-wrap:anywhere}
td:last-child,th:last-child{padding-right:0}
details{margin:10px 0}
summary{cursor:pointer;padding:6px 0}
pre{background:var(--raised);border:1px solid var(--line);padding:14px 16px;margin:0 0 14px;overflow-x:auto;
line-height:1.5}
pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:13px}
.key{display:inline-block;margin-right:16px}
.keys{margin-bottom:4px}
.key i{display:inline-block;width:14px;height:12px;margin-right:6px;vertical-align:-1px}
.key .kept,.key .full{background:var(--kept)}
.key .local{background:var(--local);opacity:.45}
.key .plate{border:1px solid var(--local)}
.key .shared{border:1.5px solid var(--kept)}
.key .native{border:1px dashed var(--local)}
.key .warn{height:0;border-top:2px dashed var(--warn);vertical-align:4px}
.key .band{background:var(--local);opacity:.25}
footer{border-top:1px solid var(--line);margin-top:56px;padding-top:18px}
svg{display:block;overflow:visible}
svg text{font-size:11px;fill:var(--muted)}
svg .middle{text-anchor:middle}
svg .end{text-anchor:end}
svg .ink{fill:var(--ink)}
svg.bars text{font-size:13px}
svg .value{font-weight:600}
svg .halo{paint-order:stroke;stroke:var(--paper);stroke-width:4px;stroke-linejoin:round}
svg .on-full{fill:var(--onkept);font-weight:600}
svg .on-shared{fill:var(--kept);font-weight:600}
svg .kept,svg .full,svg .dot{fill:var(--kept)}
svg .local{fill:var(--local)}
svg .plate,svg .native{fill:none;stroke:var(--local);stroke-opacity:.55}
svg .native{stroke-dasharray:3 3}
svg .shared{fill:var(--paper);stroke:var(--kept);stroke-width:1.5px}
svg .span{fill:var(--kept);opacity:.5}
svg .track,svg .band{fill:var(--local);opacity:.16}
svg .other{fill:var(--local)}
svg .dot{stroke:var(--paper);stroke-width:1.5px;fill-opacity:.85}
svg line,svg polyline{fill:none;vector-effect:non-scaling-stroke}
svg .grid{stroke:var(--line)}
svg .mark{stroke:var(--ink);stroke-dasharray:2 3}
svg .warn{stroke:var(--warn);stroke-dasharray:5 4}
svg .faint{stroke:var(--kept);opacity:.3}
svg .strong{stroke:var(--kept);stroke-width:2px}
svg .other-line{stroke:var(--local);stroke-width:2px}
.key .line{height:0;border-top:2px solid var(--kept);vertical-align:4px}
.key .other-line{height:0;border-top:2px solid var(--local);vertical-align:4px}
@media (max-width:640px){svg .on-full,svg .on-shared{font-size:9px}main{padding:32px 16px 48px}
h1{font-size:24px}section{margin-top:40px;padding-top:20px}
.readings{grid-template-columns:1fr 1fr}.readings div{padding:12px 12px 10px}.readings .value{font-size:19px}
th,td{padding-right:12px}table{font-size:13px}}
"""


def page(name: str, body: Sequence[str]) -> str:
    """The whole document; it loads nothing."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(name: str, title: str, *parts: str) -> str:
    """A section with a heading; ``name`` is its anchor."""
    return f'<section id="{escape(name)}">\n<h2>{escape(title)}</h2>\n{chr(10).join(p for p in parts if p)}\n</section>'


def title(text: str) -> str:
    """The page's first heading."""
    return f"<h1>{escape(text)}</h1>"


def heading(text: str) -> str:
    """A small heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str, name: str = "") -> str:
    """Plain words."""
    kind = f' class="{name}"' if name else ""
    return f"<p{kind}>{escape(text)}</p>"


def verdict(good: bool, word: str, text: str) -> str:
    """The gate's stamp and its sentence."""
    return f'<p class="verdict{"" if good else " bad"}"><b>{escape(word)}</b>{escape(text)}</p>'


def caution(text: str) -> str:
    """A sentence to beware of."""
    return f'<p class="caution">{escape(text)}</p>'


def link(name: str, text: str) -> str:
    """A line that leads to a section."""
    return f'<p class="quiet"><a href="#{escape(name)}">{escape(text)}</a></p>'


def preformatted(text: str) -> str:
    """Code, as it is."""
    return f"<pre>{escape(text)}</pre>"


def figure(svg: str, caption: str, keys: Sequence[tuple[str, str]] = ()) -> str:
    """A drawing with its caption and the meaning of its colours (class, words). ``svg`` is markup."""
    marks = "".join(f'<span class="key"><i class="{escape(k)}"></i>{escape(words)}</span>' for k, words in keys)
    legend = f'<div class="keys">{marks}</div>' if marks else ""
    return f"<figure>{svg}<figcaption>{legend}{escape(caption)}</figcaption></figure>"


def folded(summary: str, body: str) -> str:
    """Shown on demand. ``body`` is markup."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what is to be said of each."""
    lines = "".join(f'<tr><td class="name">{escape(name)}</td><td>{escape(words)}</td></tr>' for name, words in rows)
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """The first ``words`` columns are words, the others numbers and to the right."""

    def row(cells: Sequence[str], tag: str) -> str:
        marks = (' class="num"' if i >= words else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def readings_grid(readings: Sequence[Reading]) -> str:
    """The instrument's dials."""
    cells = (
        f'<div><dt>{escape(r.label)}</dt><dd class="value">{escape(r.value)}</dd>'
        f'<dd class="note">{escape(r.note)}</dd></div>'
        for r in readings
    )
    return f'<dl class="readings">{"".join(cells)}</dl>'
