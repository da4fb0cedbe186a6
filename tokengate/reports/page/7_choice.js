// What is chosen and pinned, and the keys; the URL's fragment has it, too

function choose(members) {
  const all = members.every((number) => state.chosen.has(number));
  for (const number of members) all ? state.chosen.delete(number) : state.chosen.add(number);
  showAll();
}

/** Keep the details of a position; let go of the one that is kept. */
function pin(view, position) {
  const [kept, at] = state.pin ?? [];
  const same = kept === view && views[view].unitOf[at] === views[view].unitOf[position];
  state.pin = same ? null : [view, position];
  showAll();
}

function release() {
  if (state.pin) state.pin = null;
  else state.chosen.clear();
  showAll();
}

const PANELS = {
  sparsity: (panel) => panel.childElementCount || drawHeatmaps(panel, "sparsity"),
  tau: (panel) => panel.childElementCount || drawHeatmaps(panel, "tau"),
  r: drawRatios,
  course: drawCourse,
};

function showTab() {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const name = tab.id.slice("tab-".length);
    const selected = name === state.tab;
    tab.setAttribute("aria-selected", selected);
    tab.tabIndex = selected ? 0 : -1;
    byId(`panel-${name}`).hidden = !selected;
    if (selected) PANELS[name](byId(`panel-${name}`));
  }
}

function showAll() {
  showTab();
  shade();
  drawRanking();
  const names = [...state.chosen].sort((a, b) => a - b).map((number) => modules[number].name);
  const few = names.length <= 3 ? `: ${names.join(", ")}` : "";
  byId("chosen").textContent = names.length
    ? `${count(names.length)} of ${plural(modules.length, "module")} chosen${few}`
    : `All ${plural(modules.length, "module")}`;
  byId("all").disabled = !state.chosen.size;
  byId("release").hidden = !state.pin;
  cells.forEach((buttons, number) => {
    for (const button of buttons) button.setAttribute("aria-pressed", state.chosen.has(number));
  });
  for (const { button, members } of groups) {
    const inside = members.filter((number) => state.chosen.has(number)).length;
    button.setAttribute("aria-pressed", inside === members.length ? true : inside ? "mixed" : false);
  }
  const [view, at] = state.pin ?? [];
  views.forEach((each, v) => each.buttons.forEach((button, u) => {
    button.setAttribute("aria-pressed", v === view && each.unitOf[at] === u);
  }));
  if (state.pin) described = views[view].buttons[views[view].unitOf[at]];
  if (described.isConnected === false) described = { describe: hint };
  described.describe();
  remember();
}

// The fragment

function remember() {
  const parts = [];
  if (state.tab !== "sparsity") parts.push(`tab=${state.tab}`);
  if (state.chosen.size) parts.push(`modules=${[...state.chosen].sort((a, b) => a - b).join(".")}`);
  if (state.pin) parts.push(`at=${state.pin.join(".")}`);
  if (state.shade !== "share") parts.push(`shade=${state.shade}`);
  if (state.words) parts.push("words");
  if (state.relative) parts.push("relative");
  const fragment = parts.join("&");
  if (fragment !== location.hash.slice(1)) history.replaceState(null, "", `#${fragment}`);
}

function recall() {
  const told = new URLSearchParams(location.hash.slice(1));
  const numbers = (key) => (told.get(key) ?? "").split(".").filter((each) => /^\d+$/.test(each)).map(Number);
  state.tab = document.getElementById(`tab-${told.get("tab")}`) ? told.get("tab") : "sparsity";
  state.chosen = new Set(numbers("modules").filter((n) => n < modules.length));
  const [view, position] = numbers("at");
  state.pin = position < views[view]?.length ? [view, position] : null;
  state.shade = hasEffects && told.get("shade") in EFFECTS ? told.get("shade") : "share";
  state.words = told.has("words");
  state.relative = told.has("relative");
  byId("shade").value = state.shade;
  byId("words").checked = state.words;
  byId("relative").checked = state.relative;
  described = { describe: hint };
  views.forEach(drawView);
  showAll();
}

// Arrow keys: one stop of the tab key for each heatmap and for each sample

function neighbour(button, right, down) {
  const [place, line] = [button.closest("td, th"), button.closest("tr")];
  const lines = [...button.closest("table").rows];
  let [r, c] = [line.rowIndex + down, place.cellIndex + right];
  for (; lines[r] && lines[r].cells[c]; r += down, c += right) {
    const found = lines[r].cells[c].querySelector("button");
    if (found) return found;
  }
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function walk(event) {
  if (event.key === "Escape") return release();
  const arrow = ARROWS[event.key];
  const from = event.target.closest(".token, .patch, .heatmap button, [role=tab]");
  if (!arrow || !from) return;
  const to = from.role === "tab" ? from[arrow[0] < 0 ? "previousElementSibling" : "nextElementSibling"]
    : from.step ? from.step(...arrow) : neighbour(from, ...arrow);
  if (!to || (from.role === "tab" && arrow[1])) return;
  event.preventDefault();
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
  if (to.role === "tab") to.click();
}
