// Details of what the pointer or the keyboard is on, or of what is pinned

let described = { describe: hint };

function hint() {
  if (touch) return show("Tap a module, a token or a patch", ["Tap a token again to let it go."], []);
  show("Point at a module, a token or a patch", [
    "Or reach them with the tab and arrow keys.",
    "A click or Enter keeps a token's details and chooses a module; Esc lets go of both.",
  ], []);
}

function show(heading, lines, pairs, ...more) {
  const list = pairs.flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]);
  byId("details").replaceChildren(
    element("h3", { class: "quoted" }, heading),
    ...lines.map((line) => element("p", {}, line)),
    ...(list.length ? [element("dl", {}, ...list)] : []),
    ...more,
  );
}

function mark(isMarked) {
  cells.forEach((buttons, number) => {
    for (const button of buttons) button.classList.toggle("modifies", isMarked(number));
  });
}

function describeModule(number) {
  const found = reports.map((_, which) => said(number, which));
  mark(() => false);
  const both = (text) => found.map((m) => (m === null ? "–" : text(m))).join(" | ");
  const known = found.filter((m) => m && m.sparsity !== null);
  const tau = ["tau", both((m) => m.tau ?? "none")];
  if (!known.length) return show(modules[number].name, [], [["sparsity", "never called"], tau]);
  const pairs = [
    ["sparsity", both((m) => (m.sparsity === null ? "–" : `${percent(m.sparsity)} %`))],
    tau,
    ["positions", both((m) => count(m.positions))],
    ["modified", both((m) => count(m.modified))],
    ["samples", both((m) => count(m.samples))],
  ];
  if (known.length === 2) {
    pairs.splice(1, 0, ["change", `${signed(100 * (known[1].sparsity - known[0].sparsity))} points`]);
  }
  const lines = reports.length > 1 ? [reports.map(({ name }) => name).join(" | ")] : [];
  const bars = found.flatMap((m, which) => (m?.ratios ? [ratioBars(ratioAxis(WIDTHS.aside), [number], which, 110)] : []));
  show(modules[number].name, lines, pairs, ...bars);
}

/** Where a unit is: a token of its text, or a patch of its image. */
function placeOf(view, unit) {
  const [i] = unit;
  if (!view.tokens) return `row ${Math.floor(i / view.columns) + 1}, column ${(i % view.columns) + 1}`;
  const to = unit.length > 1 ? ` to ${count(unit.at(-1) + 1)}` : "";
  return `token${to && "s"} ${count(i + 1)}${to} of ${count(view.length)}`;
}

function describePosition(view, u) {
  const unit = view.units[u];
  const { places } = view;
  const real = view.real[unit[0]];
  const hits = new Set(real ? places.filter((k) => unit.some((i) => view.isOpen[k][i])) : []);
  mark((number) => hits.has(view.modules.indexOf(number)));
  const what = view.tokens ? `“${joined(view, unit)}”` : "patch";
  const where = placeOf(view, unit);
  if (!real) return show(what, [`${where}: padding, which is not counted`], []);
  if (!places.length) return show(what, [`${where}: none of the chosen modules saw it`], []);
  const total = plural(places.length, "module");
  const share = percent(shareOf(view, unit));
  const effects = [];
  const change = effect(view, "log_prob", unit);
  const kl = effect(view, "kl", unit);
  const ratio = ratioOf(view, unit);
  if (change !== null) effects.push(["log-probability", `${signed(change)} nats, ${short(Math.exp(change))} times as likely`]);
  if (kl !== null) effects.push(["KL from the base", `${short(kl)} nats`]);
  if ((view.log_prob || view.kl) && change === null && kl === null) effects.push(["effect", "none: nothing predicts it"]);
  if (ratio !== null) effects.push([places.length > 1 ? "r on average" : "r", `about ${short(ratio)}`]);
  show(
    what, [`${where}: modified by ${count(hits.size)} of ${total}, ${share} %`],
    [...effects, ...byLayer(view, places, hits)],
  );
}

/** The layers that have one of `hits`, each with its projections that are, shortly said. */
function byLayer(view, places, hits) {
  const name = (k) => columns[modules[view.modules[k]].column];
  return rows.flatMap((layer, r) => {
    const inside = places.filter((k) => modules[view.modules[k]].row === r);
    const [modify, leave] = [inside.filter((k) => hits.has(k)), inside.filter((k) => !hits.has(k))];
    if (!modify.length) return [];
    let told = modify.map(name).join(", ");
    if (inside.length > 2 && !leave.length) told = "all";
    if (inside.length > 2 && leave.length === 1) told = `all but ${name(leave[0])}`;
    return [[/^\d+$/.test(layer) ? `layer ${layer}` : layer, told]];
  });
}

function describe(event) {
  const target = event.target.closest?.(".token, .patch, td button");
  if (!target || state.pin) return;
  described = target;
  target.describe();
}
