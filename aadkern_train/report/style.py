"""The report's style sheet and its only script: plain, dark and light, readable from 360 pixels up."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --ink: #1d2125; --soft: #5b646d; --rule: #dfe2e1; --unseen: #eff0ee;
  --blue: #2f6fb5; --amber: #b9770e; --green: #1c8a63; --rose: #b8486b; --violet: #7359b6; --grey: #7d868d;
  --slate: #4f6272; --teal: #0d8798; --olive: #7a7f1c; --plum: #a0429d; --sand: #a4875a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181b; --card: #1c2024; --ink: #e6e8ea; --soft: #a2abb3; --rule: #343a40; --unseen: #262b30;
    --blue: #6fabec; --amber: #e0a63f; --green: #4fc397; --rose: #ea82a2; --violet: #ab95ea; --grey: #929ba3;
    --slate: #a9bccb; --teal: #45c1d0; --olive: #bcc25a; --plum: #d987d6; --sand: #cfb384;
  }
}
.c-ink { --c: var(--ink); } .c-blue { --c: var(--blue); } .c-amber { --c: var(--amber); }
.c-green { --c: var(--green); } .c-slate { --c: var(--slate); } .c-teal { --c: var(--teal); }
.c-olive { --c: var(--olive); } .c-plum { --c: var(--plum); } .c-sand { --c: var(--sand); }
.c-rose { --c: var(--rose); } .c-violet { --c: var(--violet); } .c-grey { --c: var(--grey); }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .4rem; padding-top: 1.2rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { max-width: 46rem; margin: .4rem 0 .9rem; }
ul.summary { max-width: 46rem; padding-left: 1.2rem; margin: .4rem 0; }
ul.summary li { margin-bottom: .5rem; }
.problems { color: var(--soft); font-size: .9rem; }
pre {
  font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-x: auto;
  background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: .8rem 1rem;
}
summary { cursor: pointer; color: var(--soft); padding: .3rem 0; }

.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
table.narrow { width: auto; min-width: 30rem; }
th, td { padding: .42rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
thead th { font-weight: 600; font-size: .84rem; color: var(--soft); vertical-align: bottom; }
thead th span, tbody th span { font-weight: 400; color: var(--soft); white-space: nowrap; }
.narrow thead th { white-space: normal; }
tbody th:first-child, thead th:first-child { position: sticky; left: 0; background: var(--page); }
tbody th { font-weight: 500; }
tbody th:has(.swatch) { padding-left: 1.3rem; text-indent: -1.1rem; }
tr.reference { color: var(--soft); }
tr:not(.reference) + tr.reference > * { border-top: 1px solid var(--rule); }
td.best b {
  background: color-mix(in srgb, var(--green) 18%, transparent); border-radius: 4px;
  padding: .1rem .35rem; margin-right: -.35rem;
}
td.verdict.better { color: var(--green); font-weight: 600; }
td.verdict.worse { color: var(--amber); font-weight: 600; }
td.shaded { background: color-mix(in srgb, var(--blue) calc(var(--share) * 34%), transparent); }
.swatch {
  display: inline-block; width: .62rem; height: .62rem; border-radius: 2px; margin-right: .5rem;
  background: var(--c);
}

dl.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8rem 1.4rem; margin: 1rem 0;
}
dl.facts dt { color: var(--soft); font-size: .8rem; }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
dl.meanings dt { font-weight: 600; font-size: .92rem; }
dl.meanings dd { margin: 0 0 .6rem; color: var(--soft); font-size: .92rem; max-width: 46rem; }
.bar { display: flex; height: .7rem; border-radius: 4px; overflow: hidden; gap: 1px; margin: .3rem 0 .5rem; }
.bar span { background: var(--c); min-width: 2px; }

figure {
  margin: 0; min-width: 0; padding: .8rem .9rem;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
}
figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .25rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem; }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 460px)); }
details > .grid { margin-top: .6rem; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 1rem; }
.clips.captioned { grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.clip .row { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); row-gap: .25rem; }
.clip .row span {
  font-size: .74rem; line-height: 1.25; color: var(--soft); padding: 0 .3rem .35rem 0; overflow-wrap: anywhere;
}
figcaption small { font-weight: 400; color: var(--soft); }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; padding: 0; margin: 0 0 .35rem;
  font-size: .8rem; color: var(--soft);
}
.legend li::before {
  content: ""; display: inline-block; width: 1.1rem; border-top: 2.5px solid var(--c);
  margin-right: .4rem; vertical-align: .25em;
}
.legend li.dashed::before { border-top-style: dashed; }

svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11.5px; font-family: inherit; }
svg text.band { fill: var(--ink); font-weight: 600; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 5 3; }
.line.level { stroke-width: 1.2; stroke-dasharray: 3 3; }
.line.faint { opacity: .28; stroke-width: 1; }
.dot { fill: var(--card); stroke: var(--c); stroke-width: 1.6; }
.rule { stroke: var(--rule); stroke-width: 1; }
.axis, .border { stroke: var(--soft); stroke-width: 1; }
.border { opacity: .5; }
.unseen { fill: var(--unseen); }
.itself { fill: var(--green); opacity: .85; }
.window { fill: var(--blue); opacity: .85; }
.sink { fill: var(--amber); opacity: .85; }
.frame-border { stroke: var(--card); stroke-width: .6; opacity: .55; }
.chunk-border { stroke: var(--card); stroke-width: 1.8; }
.bracket { fill: none; stroke: var(--soft); }

.strips {
  display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem .9rem; align-items: center;
  font-size: .86rem; margin: .5rem 0 1.6rem;
}
.strips img, canvas { display: block; width: 100%; height: auto; }
.pixels { image-rendering: pixelated; }
.controls { display: flex; align-items: center; gap: .8rem; margin: .6rem 0 1rem; }
.controls button {
  font: inherit; color: inherit; min-width: 5.2rem; padding: .25rem .9rem; cursor: pointer;
  border: 1px solid var(--rule); border-radius: 6px; background: var(--card);
}
.controls input { flex: 1; max-width: 20rem; accent-color: var(--blue); }
@media (max-width: 560px) {
  main { padding: 1.4rem .9rem 3rem; }
  h1 { font-size: 1.55rem; }
  th, td { padding: .4rem .45rem; }
  tbody th { white-space: normal; min-width: 7.5rem; }
  table.narrow { min-width: 0; width: 100%; font-size: .84rem; }
  .narrow tbody th { min-width: 0; }
  .narrow thead th { font-size: .74rem; }
  .narrow th, .narrow td { padding: .4rem .2rem; }
  .strips { grid-template-columns: minmax(0, 1fr); gap: .1rem; }
  .strips img { margin-bottom: .5rem; }
}
@media print { .controls { display: none; } figure { break-inside: avoid; } }
"""

SCRIPT = """
for (const player of document.querySelectorAll("[data-frames]")) {
  const frames = Number(player.dataset.frames);
  const button = player.querySelector("button"), slider = player.querySelector("input");
  const sheets = [...player.querySelectorAll("canvas")].map((canvas) => {
    const image = new Image();
    image.onload = () => show();
    image.src = canvas.dataset.sheet;
    return [canvas, canvas.getContext("2d"), image];
  });
  let t = 0, playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const show = () => {
    for (const [{ width, height }, context, image] of sheets) {
      context.clearRect(0, 0, width, height);
      if (image.complete) context.drawImage(image, 0, t * height, width, height, 0, 0, width, height);
    }
    slider.value = t;
  };
  const play = (yes) => { playing = yes; button.textContent = playing ? "Pause" : "Play"; };
  button.onclick = () => play(!playing);
  slider.oninput = () => { play(false); t = Number(slider.value); show(); };
  setInterval(() => { if (playing) { t = (t + 1) % frames; show(); } }, 1000 / Number(player.dataset.fps));
  play(playing);
  show();
}
"""
