// Draws what the table twin says: how many devices ran each release, stacked, day by day.
// The table stays the truth: the chart reads its cells, and reads them again after each change.
(() => {
  "use strict";
  const TONES = ["--good-fill", "--moving-fill", "--wait-fill", "--idle-fill", "--dim", "--line"];
  let shown = "";

  const tables = () => Array.from(document.querySelectorAll("table.share"));

  // `getPropertyValue("--x")` gives the raw light-dark(…): the resolved colour stands on an element.
  function colour(box, token) {
    const probe = document.createElement("span");
    probe.className = "probe";
    probe.style.color = `var(${token})`;
    box.appendChild(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  }

  function read(table) {
    const heads = Array.from(table.tHead.rows[0].cells).slice(1);
    const names = heads.map((cell) => cell.textContent);
    const tones = heads.map((cell) => TONES[Math.min(Number(cell.dataset.tone), TONES.length - 1)]);
    const rows = Array.from(table.tBodies[0].rows);
    const days = rows.map((row) => Date.parse(row.querySelector("time").dateTime) / 1000);
    const counts = names.map((_, i) => rows.map((row) => Number(row.cells[i + 1].dataset.v)));
    return { names, tones, days, counts };
  }

  // `24 Nov`, as everywhere on these pages.
  function day(ts) {
    const at = new Date(ts * 1000);
    return `${at.getUTCDate()} ${at.toLocaleString("en", { month: "short", timeZone: "UTC" })}`;
  }

  function draw() {
    const box = document.getElementById("share-chart");
    const all = tables();
    if (!box || typeof uPlot === "undefined") return;
    const table = all.find((one) => one.dataset.share === shown) || all[0];
    if (!table) { box.hidden = true; return; }
    shown = table.dataset.share;
    const { names, tones, days, counts } = read(table);
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const key = JSON.stringify([shown, names, tones, counts, all.length, innerWidth, dark]);
    if (box.dataset.key === key) return;
    box.dataset.key = key;
    box.hidden = false;
    box.replaceChildren();
    box.appendChild(chooser(all, table));
    const dim = colour(box, "--dim");
    const grid = colour(box, "--line");
    const axis = { stroke: dim, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid } };
    // Each release lies on those below it; the topmost is painted first.
    const sums = counts.map((_, i) => days.map((_, at) => counts.slice(0, i + 1).reduce((sum, one) => sum + one[at], 0)));
    const order = names.map((_, i) => names.length - 1 - i);
    new uPlot({
      width: Math.max(240, box.clientWidth - 16),
      height: 200,
      tzDate: (ts) => uPlot.tzDate(new Date(ts * 1000), "UTC"),
      scales: { x: { time: true }, y: { range: (_, low, high) => [0, Math.max(1, high)] } },
      cursor: { drag: { x: false, y: false } },
      axes: [{ ...axis, space: 60, values: (_, ticks) => ticks.map(day) }, { ...axis, size: 56, label: "devices", stroke: dim }],
      series: [
        { label: "day", value: (_, ts) => (ts === null ? "–" : day(ts)) },
        ...order.map((i) => ({
          label: names[i],
          stroke: colour(box, tones[i]),
          fill: colour(box, tones[i]),
          width: 1,
          points: { show: false },
          value: (u, _, __, at) => (at === null || at === undefined ? "–" : String(counts[i][at])),
        })),
      ],
      hooks: { setCursor: [rest], ready: [rest] },
    }, [days, ...order.map((i) => sums[i])], box);
  }

  // Without a pointer on it the legend tells the last numbers, not dashes.
  function rest(u) {
    if (u.cursor.idx === null || u.cursor.idx === undefined || u.cursor.left < 0) {
      u.setLegend({ idx: u.data[0].length - 1 });
    }
  }

  function chooser(all, table) {
    const label = document.createElement("label");
    label.textContent = "Fleet ";
    const select = document.createElement("select");
    for (const one of all) {
      const option = new Option(one.dataset.share, one.dataset.share);
      option.selected = one === table;
      select.add(option);
    }
    select.addEventListener("change", () => { shown = select.value; draw(); });
    label.appendChild(select);
    return label;
  }

  document.addEventListener("DOMContentLoaded", draw);
  document.addEventListener("htmx:sse:after:message", () => setTimeout(draw, 20));
  addEventListener("resize", () => setTimeout(draw, 100));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
