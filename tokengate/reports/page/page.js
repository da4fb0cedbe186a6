"use strict";
// What the report says is put in as text, never as markup.

const report = JSON.parse(document.getElementById("data").textContent);
const { modules, rows, columns, views } = report;
const chosen = new Set(); // of modules, by number; none stands for all of them
const cells = []; // the heatmap's button of each module
const groups = []; // the buttons of layers and projections, with the modules they stand for
let described = { // what the pointer or the keyboard was on last
  describe: () => show(
    "Point at a module, a token or a patch", ["Or reach them with the tab and arrow keys."], [],
  ),
};

const byId = (id) => document.getElementById(id);
const percent = (share) => (100 * share).toFixed(1);
const count = (number) => number.toLocaleString("en");
const plural = (number, noun) =>
  `${count(number)} ${number === 1 ? noun : noun === "patch" ? "patches" : `${noun}s`}`;

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The heatmap

function cell(number) {
  const { name, sparsity } = modules[number];
  const called = sparsity !== null;
  const said = called ? `sparsity ${percent(sparsity)} %` : "never called";
  const button = element(
    "button", { type: "button", "aria-label": `${name}: ${said}` }, called ? percent(sparsity) : "–",
  );
  if (called) button.style.setProperty("--value", sparsity);
  else button.className = "uncalled";
  button.describe = () => describeModule(number);
  button.addEventListener("click", () => choose([number]));
  cells[number] = button;
  return button;
}

function group(name, label, members) {
  // Long names may break after a dot.
  const parts = name.split(/(?<=\.)/).flatMap((part) => [part, element("wbr", {})]);
  const button = element("button", { type: "button", "aria-label": label }, ...parts);
  button.addEventListener("click", () => choose(members));
  groups.push({ button, members });
  return button;
}

const average = (share) =>
  element("td", { class: "average" }, share === null ? "–" : percent(share));

function drawHeatmap() {
  const numbers = modules.map((_, number) => number);
  const at = new Map(modules.map(({ row, column }, number) => [`${row},${column}`, number]));
  const heads = columns.map((name, c) => element(
    "th", { scope: "col" },
    group(name, `projection ${name}`, numbers.filter((n) => modules[n].column === c)),
  ));
  const body = rows.map((name, r) => element(
    "tr", {},
    element(
      "th", { scope: "row" },
      group(name, `layer ${name}`, numbers.filter((n) => modules[n].row === r)),
    ),
    ...columns.map((_, c) => {
      const number = at.get(`${r},${c}`);
      return element("td", {}, ...(number === undefined ? [] : [cell(number)]));
    }),
    average(report.row_averages[r]),
  ));
  const mean = element("th", { scope: "col", class: "average" }, "avg");
  const foot = element(
    "tr", {}, element("th", { scope: "row", class: "average" }, "avg"),
    ...report.column_averages.map(average), average(report.sparsity),
  );
  byId("heatmap").append(
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "layer"), ...heads, mean)),
    element("tbody", {}, ...body),
    element("tfoot", {}, foot),
  );
}

// Samples: a text's tokens and an image's patches are both positions

function bits(packed, count) {
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  return Uint8Array.from({ length: count }, (_, i) => (bytes[i >> 3] >> (i & 7)) & 1);
}

// Space, control characters and those of no width would not be seen.
function visible(token) {
  const shown = token.replace(/[\x00-\x1f\x7f]/g, (c) => {
    if (c === "\n") return "↵";
    if (c === "\t") return "⇥";
    return c === "\x7f" ? "␡" : String.fromCharCode(0x2400 + c.charCodeAt(0));
  });
  return /^[\s\p{Cf}]*$/u.test(shown) ? "␣".repeat(Math.max(1, shown.length)) : shown;
}

function drawText(view) {
  const text = element("div", { class: "text", role: "group", "aria-label": "tokens" });
  view.positions = view.tokens.map((token, i) => {
    const span = element("span", { class: "token" }, visible(token));
    span.classList.toggle("padding", !view.real[i]);
    text.append(span);
    if (token.includes("\n")) text.append(element("br", {}));
    return span;
  });
  return text;
}

function drawImage(view) {
  const picture = (alt) => {
    const image = element("img", { src: view.source, alt });
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 200));
    return image;
  };
  const patches = element("div", { class: "patches", role: "group", "aria-label": "patches" });
  patches.style.gridTemplate =
    `repeat(${view.rows}, minmax(0, 1fr)) / repeat(${view.columns}, minmax(0, 1fr))`;
  view.positions = Array.from(view.real, () => element("span", { class: "patch" }));
  patches.append(...view.positions);
  return element(
    "div", { class: "image" },
    element("div", { class: "picture" }, picture("the picture")),
    element("div", { class: "picture shaded" }, picture(""), patches),
  );
}

function drawView(view) {
  const width = 8 * Math.ceil(view.length / 8);
  const open = bits(view.open, view.modules.length * width);
  view.isOpen = view.modules.map((_, k) => open.subarray(k * width, k * width + view.length));
  view.real = bits(view.real, view.length);
  view.noun = view.tokens ? "token" : "patch";
  const like = views.filter((other) => Boolean(other.tokens) === Boolean(view.tokens));
  const title = view.title || `${view.tokens ? "Text" : "Image"} ${like.indexOf(view) + 1}`;
  view.summary = element("p", {});
  byId("samples").append(
    element("h3", {}, title), view.summary, view.tokens ? drawText(view) : drawImage(view),
  );
  view.positions.forEach((position, i) => {
    position.tabIndex = i ? -1 : 0;
    position.describe = () => describePosition(view, i);
    position.step = (right, down) => view.positions[i + right + down * (view.columns || 1)];
  });
}

/** The view's modules that count, by their place in the view. */
function counted(view) {
  return [...view.modules.keys()].filter((k) => !chosen.size || chosen.has(view.modules[k]));
}

function shade(view) {
  const places = counted(view);
  const open = new Uint32Array(view.length);
  for (const k of places) view.isOpen[k].forEach((bit, i) => { open[i] += bit; });
  let [sum, real] = [0, 0];
  view.positions.forEach((position, i) => {
    if (!view.real[i]) return;
    const share = places.length ? open[i] / places.length : 0;
    position.style.setProperty("--value", share);
    position.classList.toggle("unseen", !places.length);
    sum += share;
    real += 1;
  });
  const padding = view.length - real;
  const found = plural(real, view.noun) + (padding ? ` and ${count(padding)} of padding` : "");
  const modified = places.length
    ? `${real ? percent(sum / real) : "–"} % modified on average over ${plural(places.length, "module")}`
    : "none of the chosen modules saw them";
  view.summary.textContent = `${found}; ${modified}`;
}

// What is chosen

function choose(members) {
  const all = members.every((number) => chosen.has(number));
  for (const number of members) all ? chosen.delete(number) : chosen.add(number);
  showChosen();
}

function showChosen() {
  const names = [...chosen].sort((a, b) => a - b).map((number) => modules[number].name);
  const few = names.length <= 3 ? `: ${names.join(", ")}` : "";
  byId("chosen").textContent = names.length
    ? `${count(names.length)} of ${plural(modules.length, "module")} chosen${few}`
    : `All ${plural(modules.length, "module")}`;
  byId("all").disabled = !chosen.size;
  cells.forEach((button, number) => button.setAttribute("aria-pressed", chosen.has(number)));
  for (const { button, members } of groups) {
    const inside = members.filter((number) => chosen.has(number)).length;
    button.setAttribute("aria-pressed", inside === members.length ? true : inside ? "mixed" : false);
  }
  views.forEach(shade);
  described.describe();
}

// Details of what the pointer or the keyboard is on

function show(heading, lines, pairs) {
  const list = pairs.flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]);
  byId("details").replaceChildren(
    element("h3", { class: "quoted" }, heading),
    ...lines.map((line) => element("p", {}, line)),
    element("dl", {}, ...list),
  );
}

function mark(isMarked) {
  cells.forEach((button, number) => button.classList.toggle("modifies", isMarked(number)));
}

function describeModule(number) {
  const module = modules[number];
  mark(() => false);
  const tau = ["tau", module.tau === null ? "none" : module.tau];
  show(module.name, [], module.sparsity === null ? [["sparsity", "never called"], tau] : [
    ["sparsity", `${percent(module.sparsity)} %`],
    tau,
    ["positions", count(module.positions)],
    ["modified", count(module.modified)],
    ["samples", count(module.samples)],
  ]);
}

function describePosition(view, i) {
  const places = counted(view);
  const hits = new Set(view.real[i] ? places.filter((k) => view.isOpen[k][i]) : []);
  mark((number) => hits.has(view.modules.indexOf(number)));
  const what = view.tokens ? `“${visible(view.tokens[i])}”` : "patch";
  const where = view.tokens
    ? `token ${count(i + 1)} of ${count(view.length)}`
    : `row ${Math.floor(i / view.columns) + 1}, column ${(i % view.columns) + 1}`;
  if (!view.real[i]) return show(what, [`${where}: padding, which is not counted`], []);
  if (!places.length) return show(what, [`${where}: none of the chosen modules saw it`], []);
  const total = plural(places.length, "module");
  const share = percent(hits.size / places.length);
  show(what, [`${where}: modified by ${count(hits.size)} of ${total}, ${share} %`], byLayer(view, places, hits));
}

/** The layers that have one of `hits`, each with its projections that are, shortly said. */
function byLayer(view, places, hits) {
  const name = (k) => columns[modules[view.modules[k]].column];
  return rows.flatMap((layer, r) => {
    const inside = places.filter((k) => modules[view.modules[k]].row === r);
    const [modify, leave] = [inside.filter((k) => hits.has(k)), inside.filter((k) => !hits.has(k))];
    if (!modify.length) return [];
    let said = modify.map(name).join(", ");
    if (inside.length > 2 && !leave.length) said = "all";
    if (inside.length > 2 && leave.length === 1) said = `all but ${name(leave[0])}`;
    return [[/^\d+$/.test(layer) ? `layer ${layer}` : layer, said]];
  });
}

function describe(event) {
  const target = event.target.closest(".token, .patch, td button");
  if (!target) return;
  described = target;
  target.describe();
}

// Arrow keys: one stop of the tab key for the heatmap and for each sample

function neighbour(button, right, down) {
  const [place, line] = [button.closest("td, th"), button.closest("tr")];
  const lines = [...byId("heatmap").rows];
  let [r, c] = [line.rowIndex + down, place.cellIndex + right];
  for (; lines[r] && lines[r].cells[c]; r += down, c += right) {
    const found = lines[r].cells[c].querySelector("button");
    if (found) return found;
  }
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function walk(event) {
  const arrow = ARROWS[event.key];
  const from = event.target.closest(".token, .patch, #heatmap button");
  if (!arrow || !from) return;
  const to = from.step ? from.step(...arrow) : neighbour(from, ...arrow);
  if (!to) return;
  event.preventDefault();
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

drawHeatmap();
byId("heatmap").querySelectorAll("button").forEach((button, i) => { button.tabIndex = i ? -1 : 0; });
views.forEach(drawView);
byId("samples").hidden = !views.length;
byId("sparsity-legend").append("0 %", element("i", {}), "100 % left alone");
if (modules.some(({ sparsity }) => sparsity === null)) {
  byId("sparsity-legend").append(element("i", { class: "uncalled" }), "never called");
}
byId("share-legend").append("0 %", element("i", {}), "100 % of the modules");
byId("all").addEventListener("click", () => { chosen.clear(); showChosen(); });
document.addEventListener("pointerover", describe);
document.addEventListener("focusin", describe);
document.addEventListener("keydown", walk);
showChosen();
