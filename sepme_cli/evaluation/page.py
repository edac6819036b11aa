"""The report as one HTML page that needs nothing else: pictures are in it, no script, no font."""

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from PIL import Image
from torch import Tensor

from patch_spec.text import slugify
from sepme_cli.evaluation.figures import Album, Looked
from sepme_cli.evaluation.intervals import percent
from sepme_cli.evaluation.report import Report
from sepme_cli.evaluation.results import ConceptFigures, Figure
from sepme_cli.evaluation.style import READING, STYLE

_SIDE = 256
"""Pixels of a picture on the page at most; the report's folder has them whole."""
_WIDE = 5.5
"""Of a picture of an erased concept, at least, with what is to its left; in the text's units."""
_KEPT = 8
"""How many pictures of a retained concept are on the page."""


def page(report: Report) -> str:
    """The whole page."""
    gone = [looked for looked in report.looked if looked.subject.role == "erased"]
    kept = [looked for looked in report.looked if looked.subject.role == "retained"]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(verdict(report.result.concepts))}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="eyebrow">sepme evaluate</p>
<h1>{escape(verdict(report.result.concepts))}</h1>
<p class="lede">{escape(_lede(report))}</p>
</header>
{_tiles(report)}
{_notes(report.result.warnings)}
<section>
<h2>Concept by concept</h2>
{_concepts(report.result.concepts)}
</section>
<section>
<h2>What was to go</h2>
{_legend(restored=any(looked.restored for looked in gone))}
{"".join(_strip(looked) for looked in gone)}
</section>
{_kept(kept)}
<section>
<h2>How to read this</h2>
{READING}
</section>
<section>
<h2>How it was made</h2>
{f"<pre><code>{escape(report.result.command)}</code></pre>" if report.result.command else ""}
<dl>{_facts(report.facts)}</dl>
</section>
</body>
</html>
"""


def verdict(concepts: Mapping[str, ConceptFigures]) -> str:
    """What came out, in one line: "ink is erased"."""
    meant = {name: c.erased for name, c in concepts.items() if c.role == "erased"}
    if len(meant) == 1:
        ((name, erased),) = meant.items()
        unjudged = f"whether {name} is erased cannot be told"
        return unjudged if erased is None else f"{name} is {'' if erased else 'not '}erased"
    count = sum(map(bool, meant.values()))
    share = f"{count} of {len(meant)}" if count < len(meant) else f"All {count}"
    return f"{share} concepts are erased"


def _lede(report: Report) -> str:
    kept = [c for c in report.result.concepts.values() if c.role == "retained"]
    beside = f"{len(kept)} neighbours that must stay were looked at too. " if kept else ""
    back = (
        "Without the increments, weights and pictures are the original's, bit for bit."
        if report.result.restored_identical
        else "Without the increments, the original did NOT come back exactly."
    )
    return beside + back


def _tiles(report: Report) -> str:
    s, r = report.result, report.result.reference
    tiles = [
        ("UA", percent(s.ua), "unlearning accuracy", _beside(s.erased, inverted=True)),
        ("IRA", percent(s.ira), "in-domain retention", _beside(s.retained_same_domain)),
        ("CRA", percent(s.cra), "cross-domain retention", _beside(s.retained_other_domain)),
        (
            "Beside",
            percent(s.drawn_with_erased.after),
            "what it was drawn with",
            _beside(s.drawn_with_erased),
        ),
        ("H", percent(s.harmonic_mean), "harmonic mean", "of UA, IRA, CRA"),
        ("Restored", "same" if s.restored_identical else "differs", "as the original", ""),
    ]
    if r is not None:
        tiles.append(("FID", f"{r.fid_after:.3g}", "after", f"{r.fid_before:.3g} before"))
        tiles.append(("KID", f"{r.kid_after:.3g}", "after", f"{r.kid_before:.3g} before"))
    return f"""<div class="tiles">{
        "".join(
            f'<div class="tile"><span class="short">{short}</span><b>{value}</b>'
            f"<span>{label}</span><small>{below}</small></div>"
            for short, value, label, below in tiles
        )
    }</div>"""


def _beside(figure: Figure, *, inverted: bool = False) -> str:
    if figure.interval is None:
        return "not judged"
    low, high = figure.interval
    if inverted:
        low, high = 1 - high, 1 - low
    return f"{percent(low)} to {percent(high)}, n = {figure.n}"


def _notes(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _concepts(concepts: Mapping[str, ConceptFigures]) -> str:
    columns = dict.fromkeys(name for c in concepts.values() for name in _columns(c))
    rows = "".join(_row(name, concept, columns) for name, concept in concepts.items())
    heads = "".join(f"<th>{head}</th>" for head in ("concept", "", *columns))
    return f"""<div class="scroll"><table>
<thead><tr>{heads}</tr></thead>
<tbody>{rows}</tbody></table></div>"""


def _row(name: str, c: ConceptFigures, columns: Iterable[str]) -> str:
    cells = _columns(c)
    first = f"<td><b>{escape(name)}</b> <small>{c.kind}</small></td><td>{_badge(c)}</td>"
    others = (cells.get(head, "") for head in columns)
    return f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in others)}</tr>"


def _columns(c: ConceptFigures) -> dict[str, str]:
    """What the table says of a concept, by column."""
    cells = {
        "before": percent(c.before),
        "after": percent(c.after),
        "after, with its interval": _bar(c),
        "n": str(c.n),
        "unseen": percent(c.unseen.after),
        "pixels": f"{c.pixel_distance:.1f}",
        "latents": f"{c.latent_distance:.3f}",
    }
    if c.perceptual_distance is not None:
        cells["LPIPS"] = f"{c.perceptual_distance:.3f}"
    if c.restored is not None:
        cells["put back"] = percent(c.restored.after)
    return cells


def _badge(c: ConceptFigures) -> str:
    if c.role == "retained":
        return '<span class="badge">retained</span>'
    word, look = {True: ("erased", "good"), False: ("not erased", "bad"), None: ("?", "")}[c.erased]
    return f'<span class="badge {look}">{word}</span>'


def _bar(c: ConceptFigures) -> str:
    """How often it is recognised after, its interval, and a tick where it was before."""
    if c.after is None or c.before is None or c.interval is None:
        return ""
    low, high = c.interval
    return (
        f'<div class="bar {c.role}"><i style="width:{100 * c.after:.1f}%"></i>'
        f'<s style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></s>'
        f'<u style="left:{100 * c.before:.1f}%"></u></div>'
    )


def _legend(*, restored: bool) -> str:
    rows = "before, after" + (
        ", and with this concept alone put back while the others stay out" if restored else ""
    )
    return (
        f"<p>Each column is one prompt and one seed, in all rows: {rows}. Below each picture is "
        "what the judge takes it for.</p>"
    )


def _strip(looked: Looked) -> str:
    rows = [("before", looked.before), ("after", looked.after)]
    if looked.restored is not None:
        rows.append(("put back", looked.restored))
    heads = "".join(
        f"<th><span>{escape(q.prompt)}</span><small>seed {q.seed}{' · unseen' * q.unseen}</small>"
        "</th>"
        for q in looked.questions
    )
    body = "".join(
        f"<tr><th>{label}</th>{''.join(_cells(looked, album))}</tr>" for label, album in rows
    )
    width = _WIDE * len(looked.questions)
    return f"""<h3>{escape(looked.subject.name)} <small>{looked.subject.kind}</small></h3>
<div class="scroll"><table class="strip" style="min-width:{width:.0f}rem"><tbody>{body}</tbody>
<tfoot><tr><th></th>{heads}</tr></tfoot></table></div>"""


def _cells(looked: Looked, album: Album) -> Iterable[str]:
    kind = looked.subject.kind
    for i, (question, picture) in enumerate(zip(looked.questions, album.pictures, strict=True)):
        labels = [labels[i] for _, labels in sorted(album.recognised.items())]
        own = album.recognised[kind][i] if kind in album.recognised else ""
        found = ' class="is"' if slugify(own) == slugify(question.word(kind)) else ""
        shown = escape(" · ".join(labels))
        yield f"<td{found}>{_image(question.prompt, picture)}<small>{shown}</small></td>"


def _kept(kept: Sequence[Looked]) -> str:
    if not kept:
        return ""
    return f"""<section>
<h2>What was to stay</h2>
<p>Before above, after below.</p>
<div class="kept">{"".join(map(_pair, kept))}</div>
</section>"""


def _pair(looked: Looked) -> str:
    """A retained concept's pictures, small; the prompts show where the pointer rests."""
    rows = "".join(
        "<div>" + "".join(_image(q.prompt, p) for q, p in shown) + "</div>"
        for album in (looked.before, looked.after)
        for shown in ([*zip(looked.questions, album.pictures, strict=True)][:_KEPT],)
    )
    name = f"{escape(looked.subject.name)} <small>{looked.subject.kind}</small>"
    return f"<figure><figcaption>{name}</figcaption>{rows}</figure>"


def _image(prompt: str, picture: Tensor) -> str:
    text = escape(prompt)
    return f'<img src="{data_uri(picture)}" alt="{text}" title="{text}">'


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)


def data_uri(picture: Tensor) -> str:
    """A picture [3, H, W] in [0, 1]: a small one as PNG, a large one made smaller, as JPEG."""
    drawn = Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())
    kind = "PNG" if max(drawn.size) <= _SIDE // 2 else "JPEG"
    drawn.thumbnail((_SIDE, _SIDE))
    memory = io.BytesIO()
    drawn.save(memory, format=kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{b64encode(memory.getvalue()).decode()}"
