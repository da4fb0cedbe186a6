// Modules by layer and projection: a table for each report

const taus = reports.flatMap((r) => r.modules.map((m) => Number(m?.tau ?? NaN))).filter(Number.isFinite);
const largestTau = Math.max(0, ...taus);

// Of a module: the number in its cell, how that is said, and how deep its colour is, 0 to 1.
const QUANTITIES = {
  sparsity: {
    about: "Sparsity by layer and projection, in percent: the share of positions that the module left alone.",
    text: (m) => (m.sparsity === null ? null : percent(m.sparsity)),
    say: (m) => (m.sparsity === null ? "never called" : `sparsity ${percent(m.sparsity)} %`),
    depth: (m) => m.sparsity,
    ends: ["0 %", "100 % left alone"],
    missing: "never called",
  },
  tau: {
    about: "The threshold tau by layer and projection: positions with r below it are left alone.",
    text: (m) => (m.tau === null ? null : Number.isFinite(Number(m.tau)) ? short(Number(m.tau)) : m.tau),
    say: (m) => (m.tau === null ? "no tau" : `tau ${m.tau}`),
    depth: (m) => {
      const tau = Number(m.tau ?? NaN);
      return Number.isFinite(tau) ? (largestTau ? Math.max(0, tau) / largestTau : 0) : null;
    },
    ends: ["0 or below", `${short(largestTau)}, the largest tau`],
    missing: "no tau",
  },
};

function cell(number, which, quantity) {
  const { name } = modules[number];
  const module = said(number, which);
  const text = module && quantity.text(module);
  const depth = module && quantity.depth(module);
  const told = module ? quantity.say(module) : "not in this report";
  const button = element("button", { type: "button", "aria-label": `${name}: ${told}` }, text ?? "–");
  if (depth === null) button.className = "uncalled";
  else button.style.setProperty("--value", depth);
  button.describe = () => describeModule(number);
  button.addEventListener("click", () => choose([number]));
  cells[number].push(button);
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

const average = (share) => element("td", { class: "average" }, share === null ? "–" : percent(share));

function heatmap(kind, which) {
  const found = reports[which];
  const numbers = modules.map((_, number) => number);
  const at = new Map(modules.map(({ row, column }, number) => [`${row},${column}`, number]));
  const averaged = kind === "sparsity";
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
      return element("td", {}, ...(number === undefined ? [] : [cell(number, which, QUANTITIES[kind])]));
    }),
    ...(averaged ? [average(found.row_averages[r])] : []),
  ));
  const mean = averaged ? [element("th", { scope: "col", class: "average" }, "avg")] : [];
  const table = element(
    "table", { class: "heatmap" },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "layer"), ...heads, ...mean)),
    element("tbody", {}, ...body),
  );
  if (averaged) {
    table.append(element("tfoot", {}, element(
      "tr", {}, element("th", { scope: "row", class: "average" }, "avg"),
      ...found.column_averages.map(average), average(found.sparsity),
    )));
  }
  if (reports.length > 1) table.prepend(element("caption", {}, found.name));
  table.querySelectorAll("button").forEach((button, i) => { button.tabIndex = i ? -1 : 0; });
  return element("div", { class: "scroll" }, table);
}

function drawHeatmaps(panel, kind) {
  const quantity = QUANTITIES[kind];
  const tables = reports.map((_, which) => heatmap(kind, which));
  if (kind === "sparsity") tables[0].firstChild.id = "heatmap";
  const legend = element("div", { class: "legend" }, quantity.ends[0], element("i", {}), quantity.ends[1]);
  if (reports.some((r) => r.modules.some((m) => m && quantity.depth(m) === null))) {
    legend.append(element("i", { class: "uncalled" }), quantity.missing);
  }
  panel.append(
    element("p", {}, quantity.about), element("div", { class: "beside" }, ...tables), legend,
  );
}
