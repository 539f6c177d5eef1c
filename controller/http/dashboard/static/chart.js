// Draws what the table twin says: estimate, always-valid band and limit over time, with uPlot.
// The table stays the truth: the chart reads its cells, and reads them again after each change.
(() => {
  "use strict";
  let plot = null;
  let shown = "";

  const tables = () => Array.from(document.querySelectorAll("table.trace"));

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
    const columns = [[], [], [], [], []];
    for (const row of table.tBodies[0].rows) {
      columns[0].push(Date.parse(row.querySelector("time").dateTime) / 1000);
      [1, 2, 3, 4].forEach((i) => {
        const text = row.cells[i].dataset.v;
        columns[i].push(text === "" ? null : Number(text));
      });
    }
    return columns;
  }

  function faint(found) {
    return found.replace(/^rgb\((.*)\)$/, "rgba($1, 0.22)");
  }

  // `24 Nov 02:14`, as everywhere on these pages; with seconds where minutes do not tell apart.
  function moment(ts, seconds) {
    const at = new Date(ts * 1000);
    const month = at.toLocaleString("en", { month: "short", timeZone: "UTC" });
    return `${at.getUTCDate()} ${month} ${at.toISOString().slice(11, seconds ? 19 : 16)}`;
  }

  function draw() {
    const box = document.getElementById("chart");
    const all = tables();
    if (!box || typeof uPlot === "undefined") return;
    const table = all.find((t) => t.dataset.trace === (shown || box.dataset.chart)) || all[0];
    if (!table || table.tBodies[0].rows.length < 2) { box.hidden = true; return; }
    shown = table.dataset.trace;
    const key = JSON.stringify([shown, read(table), all.length, innerWidth, matchMedia("(prefers-color-scheme: dark)").matches]);
    if (box.dataset.key === key) return;
    box.dataset.key = key;
    box.hidden = false;
    box.replaceChildren();
    box.appendChild(chooser(all, table));
    const line = colour(box, "--text");
    const band = colour(box, "--moving-fill");
    const limit = colour(box, "--bad");
    const grid = colour(box, "--line");
    const dim = colour(box, "--dim");
    const ratio = table.dataset.what.includes("ratio");
    const rows = read(table);
    const brief = rows[0][rows[0].length - 1] - rows[0][0] < 900;
    const tell = (ts) => moment(ts, brief);
    const dots = { show: false };
    const axis = { stroke: dim, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid } };
    plot = new uPlot({
      width: Math.max(240, box.clientWidth - 16),
      height: 240,
      tzDate: (ts) => uPlot.tzDate(new Date(ts * 1000), "UTC"),
      scales: { x: { time: true }, y: { distr: ratio ? 3 : 1 } },
      cursor: { drag: { x: false, y: false } },
      bands: [{ series: [3, 2], fill: faint(band) }],
      axes: [{ ...axis, space: brief ? 120 : 90, values: (_, ticks) => ticks.map(tell) }, { ...axis, size: 56 }],
      series: [
        { label: "UTC", value: (_, ts) => (ts === null ? "–" : tell(ts)) },
        { label: "estimate", stroke: line, width: 2, points: { show: true, size: 5 } },
        { label: "band from", stroke: band, width: 1, points: dots },
        { label: "to", stroke: band, width: 1, points: dots },
        { label: "limit", stroke: limit, width: 2, dash: [6, 4], points: dots },
      ],
      hooks: { setCursor: [rest] },
    }, rows, box);
    rest(plot);
  }

  // Without a pointer on it the legend tells the last numbers, not dashes.
  function rest(u) {
    if (u.cursor.idx === null || u.cursor.idx === undefined || u.cursor.left < 0) {
      u.setLegend({ idx: u.data[0].length - 1 });
    }
  }

  function chooser(all, table) {
    const label = document.createElement("label");
    label.textContent = "Guardrail ";
    const select = document.createElement("select");
    for (const one of all) {
      const option = new Option(`${one.dataset.trace}: ${one.dataset.what}`, one.dataset.trace);
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
