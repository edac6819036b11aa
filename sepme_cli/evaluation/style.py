"""How the page of a report looks, and what it says of its figures."""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fbfaf7; --card: #ffffff; --ink: #1d1c1a; --soft: #6d6a63; --line: #e4e0d8;
  --good: #1f7a4d; --bad: #b3372c; --tint: #2f5d8a; --track: #ece8df;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #161614; --card: #1f1f1c; --ink: #eceae4; --soft: #9d998f; --line: #34332f;
    --good: #63c795; --bad: #f08a7c; --tint: #8db8e2; --track: #2e2d29;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 72rem;
  background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
.eyebrow { margin: 0; color: var(--soft); font: 13px ui-monospace, monospace; }
h1 { margin: .2rem 0; font-size: 2.6rem; line-height: 1.15; letter-spacing: -.02em; }
h2 { margin: 3.2rem 0 .8rem; font-size: 1.35rem; letter-spacing: -.01em; }
h3 { margin: 1.8rem 0 .5rem; font-size: 1.05rem; }
h3 small, td small, th small { color: var(--soft); font-weight: 400; }
.lede { margin: .4rem 0 0; color: var(--soft); font-size: 1.1rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 2rem 0 1rem; }
.tile {
  display: flex; flex-direction: column; flex: 1 1 9.5rem; padding: .9rem 1rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
}
.tile b { font-size: 1.9rem; line-height: 1.25; letter-spacing: -.02em; }
.tile .short { color: var(--tint); font-weight: 600; }
.tile span { font-size: .92rem; }
.tile small { color: var(--soft); }
.notes { margin: 1rem 0 0; padding: .7rem 1rem .7rem 2rem; border-left: 3px solid var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
section > .scroll > table { width: 100%; }
td, th { padding: .45rem .7rem; text-align: left; white-space: nowrap; }
thead th { color: var(--soft); font-size: .82rem; font-weight: 500; }
tbody tr { border-top: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; }
.badge {
  padding: .1rem .55rem; border-radius: 1rem; border: 1px solid var(--line);
  color: var(--soft); font-size: .8rem;
}
.badge.good { border-color: var(--good); color: var(--good); }
.badge.bad { border-color: var(--bad); color: var(--bad); }
.bar {
  position: relative; width: 9rem; height: .7rem;
  border-radius: .35rem; background: var(--track);
}
.bar i {
  position: absolute; inset: 0 auto 0 0; border-radius: .35rem;
  background: var(--tint); opacity: .55;
}
.bar.erased i { background: var(--bad); }
.bar s {
  position: absolute; top: 50%; height: 2px; margin-top: -1px;
  background: var(--ink); opacity: .8;
}
.bar u {
  position: absolute; top: -3px; bottom: -3px; width: 2px; margin-left: -1px;
  background: var(--ink);
}
.strip { width: 100%; table-layout: fixed; }
.strip tr { border: 0; }
.strip td { padding: .2rem; text-align: center; vertical-align: top; }
.strip th:first-child { width: 4.6rem; }
.strip th { padding: .2rem .7rem .2rem 0; color: var(--soft); font-size: .85rem; font-weight: 500; }
.strip tfoot th {
  padding: .3rem; vertical-align: top; white-space: normal;
  text-align: center; color: var(--ink); font-size: .75rem; line-height: 1.35; font-weight: 400;
}
.strip th span, .strip td small, .strip th small { display: block; }
.strip td small { font-size: .72rem; line-height: 1.4; white-space: normal; }
.strip img {
  display: block; width: 100%; max-width: 9rem; margin: 0 auto; aspect-ratio: 1;
}
img {
  object-fit: cover; background: var(--track); border-radius: .4rem;
  outline: 1px solid var(--line); outline-offset: -1px;
}
.kept {
  display: grid; gap: 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr));
}
.kept figure { margin: 0; }
.kept figcaption { margin-bottom: .3rem; font-weight: 600; }
.kept small { color: var(--soft); font-weight: 400; }
.kept div { display: grid; grid-template-columns: repeat(8, 1fr); gap: .25rem; }
.kept div + div { margin-top: .25rem; }
.kept img { width: 100%; aspect-ratio: 1; }
.strip td.is small { color: var(--ink); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre {
  padding: .9rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap;
}
@media print { .tile, pre { break-inside: avoid; } }
""".strip()

READING = """
<p><b>before</b> and <b>after</b>: the share of a concept's pictures in which the judge recognises
it, drawn with the original and with the patched weights from the same prompts and seeds. A bar is
the share after, the line in it its 95% interval (Wilson score), the tick the share before.</p>
<p>A concept counts as <b>erased</b> where it is recognised less than half as often as before, at
95% confidence: the whole interval after lies below one half of the share before.
<b>unseen</b> is the share after in phrasings that erasing never works on.</p>
<p><b>UA</b>, <b>IRA</b> and <b>CRA</b> are those of UnlearnCanvas, each 100% at best. UA: of the
pictures asked for with an erased concept, those in which it is not recognised. IRA and CRA: of
the pictures asked for with none, those whose word is recognised, of the erased concepts' kind
(style or object) and of the other kind. <b>Beside</b>: of the pictures asked for with an erased
concept, those whose other word is recognised; an object drawn in an erased style should stay.</p>
<p><b>pixels</b>: the mean absolute difference between before and after, of 255. <b>latents</b>:
the same of the VAE's latents. What was erased should have moved; what stays should not have.</p>
<p>What this does not show: other judges, other phrasings, and whether light fine-tuning or a
learned embedding brings a concept back.</p>
""".strip()
