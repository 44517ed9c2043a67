"use strict";
// Show the text of a window, coloured by a measure of the prediction of each token, and the
// distributions of the selected token. All data are inserted as text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text");
const panel = document.getElementById("panel");
const chooser = document.getElementById("measure");
const cells = [];
let selected = -1;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// cell c shows token c; of a causal teacher, the last cell is what follows the window
const isMasked = data.chosen !== null;
const at_cell = isMasked ? data.predicted_at : [...data.predicted_at, data.tokens.length - 1];
const predicting = (cell) => data.positions[at_cell[cell] ?? -1];

function drawText() {
  const shown = isMasked ? data.tokens : [...data.tokens, " ▷"];
  shown.forEach((token, index) => {
    const cell = element("span", { id: `t${index}` });
    cell.setAttribute("role", "option");
    cell.setAttribute("aria-selected", "false");
    token.split("\n").forEach((line, part) => {
      if (part > 0) cell.append(element("b", { textContent: "↵" }), "\n");
      cell.append(line);
    });
    if (token === "") cell.append(element("b", { textContent: "·" }));
    cell.classList.toggle("start", data.starts.includes(index));
    cell.classList.toggle("chosen", isMasked && data.chosen[index]);
    cell.addEventListener("click", () => { select(index); text.focus({ preventScroll: true }); });
    cells.push(cell);
  });
  text.append(...cells);
}

function colour() {
  const measure = data.measures[chooser.selectedIndex];
  const values = cells.map((_, index) => predicting(index)?.metrics[measure.key] ?? null);
  const most = Math.max(...values.filter((value) => value !== null), 1e-9);
  cells.forEach((cell, index) => {
    const value = values[index];
    cell.classList.toggle("none", value === null);
    cell.style.setProperty("--level", `${value === null ? 0 : (100 * value) / most}%`);
  });
  document.getElementById("most").textContent = `${most.toFixed(2)} ${measure.unit}`.trim();
}

function select(index, scroll = false) {
  index = Math.max(0, Math.min(cells.length - 1, index));
  cells[selected]?.setAttribute("aria-selected", "false");
  selected = index;
  cells[index].setAttribute("aria-selected", "true");
  text.setAttribute("aria-activedescendant", `t${index}`);
  if (scroll) reveal(cells[index]);
  history.replaceState(null, "", `#${index}`);
  drawPanel();
}

function reveal(cell) {
  const box = cell.getBoundingClientRect();
  const sheet = panel.getBoundingClientRect();
  const bottom = sheet.width >= innerWidth - 1 ? sheet.top : innerHeight;
  if (box.top < 0 || box.bottom > bottom) scrollBy(0, box.top - bottom / 2);
}

const percent = (value) => {
  if (value === null) return "–";
  const shown = 100 * value;
  if (shown === 0) return "0";
  return shown >= 0.01 ? shown.toFixed(shown >= 9.995 ? 1 : 2) : shown.toExponential(0);
};

const visible = (token) =>
  token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣");

function drawPanel() {
  const at = predicting(selected);
  const isEnd = selected === data.tokens.length;
  const token = isEnd ? "after the window" : visible(data.tokens[selected]) || "(part of a character)";
  const heading = element("h2", { textContent: token });
  panel.replaceChildren(heading);
  const say = (words) => panel.append(element("p", { textContent: words }));
  if (isMasked && at.label === null)
    return say(`Token ${selected} of ${data.tokens.length}: not chosen, so it has no target.`);
  if (isMasked) {
    const original = visible(data.texts[at.label]);
    say(`Token ${selected} of ${data.tokens.length}: chosen; the original token is ${original}.`);
    panel.append(distributions(at), metrics(at));
    return;
  }
  if (!at) return say("The window's first token: nothing in the window predicts it.");
  const position = at_cell[selected];
  const where = `Token ${selected} of ${data.tokens.length}, predicted at position ${position}.`;
  if (at.label === null && at.rows.length === 0) return say(`${where} No target: it is masked.`);
  say(at.label !== null ? where
    : isEnd ? `Position ${position}, the last one: its next token is not in the window, so it adds nothing to the loss.`
    : `${where} The text ends or is masked here: it adds nothing to the loss.`);
  panel.append(distributions(at), metrics(at));
}

function metrics(at) {
  const list = element("dl");
  const add = (name, value) =>
    list.append(element("dt", { textContent: name }), element("dd", { textContent: value }));
  for (const { key, name, unit } of data.measures) {
    const value = at.metrics[key];
    if (value !== null && value !== undefined) add(name, `${value.toFixed(3)} ${unit}`);
  }
  add("cached entries", at.entries);
  add("sum of their weights", at.mass.toFixed(3));
  return list;
}

function distributions(at) {
  // a row: [id, weight, count, teacher, student]
  const columns = [{ at: 1, name: "cached", hue: "--c1" }];
  if (data.models.includes("teacher")) columns.push({ at: 3, name: "teacher", hue: "--c0" });
  if (data.models.includes("student")) columns.push({ at: 4, name: "student", hue: "--c2" });
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const name of ["token", ...columns.map((column) => `${column.name} %`)])
    head.append(element("th", { textContent: name, scope: "col" }));
  const most = Math.max(...at.rows.flatMap((row) => columns.map((column) => row[column.at] ?? 0)), 1e-9);
  const body = table.createTBody();
  for (const row of at.rows) {
    const line = body.insertRow();
    line.classList.toggle("label", row[0] === at.label);
    const name = line.insertCell();
    name.textContent = visible(data.texts[row[0]]);
    name.title = `id ${row[0]}${row[0] === at.label ? `, the ${isMasked ? "original" : "true next"} token` : ""}`;
    for (const column of columns) {
      const value = row[column.at];
      const cell = line.insertCell();
      const counted = column.at === 1 && row[2] !== null;
      cell.textContent = value === null && column.at === 1 ? "not cached" : percent(value);
      if (counted) cell.title = `${row[2]} of ${data.rounds} rounds`;
      if (value === null) continue;
      const bar = element("meter-bar");
      bar.style.setProperty("--share", `${(100 * value) / most}%`);
      bar.style.setProperty("--hue", `var(${column.hue})`);
      cell.append(bar);
    }
  }
  rest(body, at, columns);
  return table;
}

function rest(body, at, columns) {
  const line = body.insertRow();
  line.className = "rest";
  line.insertCell().textContent = "all others";
  for (const column of columns) {
    const shown = at.rows.reduce((sum, row) => sum + (row[column.at] ?? 0), 0);
    const whole = column.at === 1 ? at.mass : 1;
    line.insertCell().textContent = percent(whole - shown < 1e-6 ? 0 : whole - shown);
  }
}

// return the index of the cell in the next line of text that is closest to the selected cell
function vertical(direction) {
  const box = cells[selected].getClientRects()[0];
  const middle = (box.left + box.right) / 2;
  let line = null;
  let best = selected;
  let gap = Infinity;
  for (let i = selected + direction; i >= 0 && i < cells.length; i += direction) {
    const other = cells[i].getClientRects()[0];
    if (!other || (other.top - box.top) * direction < box.height / 2) continue;
    if (line === null) line = other.top;
    if (Math.abs(other.top - line) > box.height / 2) break;
    const distance = Math.abs((other.left + other.right) / 2 - middle);
    if (distance < gap) [gap, best] = [distance, i];
  }
  return best;
}

const keys = {
  ArrowLeft: () => selected - 1,
  ArrowRight: () => selected + 1,
  ArrowUp: () => vertical(-1),
  ArrowDown: () => vertical(1),
  Home: () => 0,
  End: () => cells.length - 1,
};

document.addEventListener("keydown", (event) => {
  if (event.target === chooser || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "c") {
    chooser.selectedIndex = (chooser.selectedIndex + 1) % data.measures.length;
    colour();
  } else if (event.key in keys) {
    event.preventDefault();
    select(keys[event.key](), true);
  }
});

for (const { name } of data.measures) chooser.append(element("option", { textContent: name }));
chooser.addEventListener("change", colour);
drawText();
colour();
const asked = Number.parseInt(location.hash.slice(1), 10);
select(Number.isNaN(asked) ? 1 : asked, !Number.isNaN(asked));
