"use strict";
// Sort tables and select their columns; draw charts, and show or hide methods in them. All data are
// inserted as text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set(data.hidden);
const views = [];

const narrow = matchMedia("(max-width: 40rem)").matches;

// --- charts

// Vega-Lite shows the tooltip of the nearest point over the area around the point, but reads the
// names of its fields from the area; the patch reads them from the point.
function patch(spec) {
  const mend = (mark) => {
    for (const inner of mark.marks ?? []) mend(inner);
    const tooltip = mark.encode?.update?.tooltip;
    if (mark.name?.endsWith("_voronoi") && tooltip?.signal)
      tooltip.signal = tooltip.signal.replace(/(?<!datum\.)datum\[/g, "datum.datum[");
  };
  mend(spec);
  return spec;
}

async function draw(place) {
  const spec = data.charts[place.dataset.chart];
  const made = await vegaEmbed(place, spec, {
    actions: false,
    renderer: "svg",
    ast: true, // expressions are interpreted, because the page's policy forbids evaluating strings
    defaultStyle: false,
    patch,
    tooltip: { disableDefaultStyle: true, theme: "custom" },
  });
  views.push(made.view);
  await made.view.signal("hidden", [...hidden]).runAsync();
}

// --- showing and hiding methods

const methodsOf = (button) =>
  button.dataset.group ? JSON.parse(button.dataset.group) : [button.dataset.method];

function showState() {
  for (const button of document.querySelectorAll("button.toggle")) {
    const on = methodsOf(button).filter((method) => !hidden.has(method)).length;
    const state = on === 0 ? "false" : on === methodsOf(button).length ? "true" : "mixed";
    button.setAttribute("aria-pressed", state);
  }
}

function toggle(methods, on) {
  for (const method of methods) on ? hidden.delete(method) : hidden.add(method);
  showState();
  for (const view of views) view.signal("hidden", [...hidden]).runAsync();
}

const all = () => [...document.querySelectorAll("button.toggle")].flatMap(methodsOf);

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.classList.contains("toggle"))
    toggle(methodsOf(button), button.getAttribute("aria-pressed") === "false");
  else if (button.dataset.all) toggle(all(), button.dataset.all === "on");
  else if (button.dataset.column) sort(button.closest("table"), Number(button.dataset.column));
});

// --- tables

// numbers come first, and cells without a number after them, in both directions
function sort(table, column) {
  const heads = table.tHead.rows[0].cells;
  const down = heads[column].ariaSort === "ascending";
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].ariaSort = down ? "descending" : "ascending";
  const rows = [...table.tBodies[0].rows];
  const value = (row) => Number.parseFloat(row.cells[column].dataset.value);
  const sign = down ? -1 : 1;
  rows.sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (Number.isNaN(a) && Number.isNaN(b))
      return sign * one.cells[column].innerText.localeCompare(other.cells[column].innerText);
    return Number.isNaN(a) ? 1 : Number.isNaN(b) ? -1 : sign * (a - b);
  });
  table.tBodies[0].append(...rows);
}

function chooser(place) {
  const table = document.getElementById(place.dataset.table);
  const show = (column, on) => {
    for (const row of table.rows) row.cells[column].hidden = !on;
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (column === 0) return;
    const box = Object.assign(document.createElement("input"), { type: "checkbox" });
    box.checked = !narrow || head.classList.contains("main");
    show(column, box.checked);
    box.addEventListener("change", () => show(column, box.checked));
    const label = document.createElement("label");
    label.append(box, ` ${head.innerText || head.textContent}`);
    place.append(label);
  });
}

document.querySelectorAll(".choices").forEach(chooser);
showState();
Promise.all([...document.querySelectorAll(".chart")].map(draw)).then(() => {
  document.documentElement.dataset.ready = "yes";
});
