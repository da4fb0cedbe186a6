// Samples: a text's tokens and an image's patches are both positions

function bits(packed, length) {
  const bytes = octets(packed);
  return Uint8Array.from({ length }, (_, i) => (bytes[i >> 3] >> (i & 7)) & 1);
}

const octets = (packed) => Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));

const EFFECTS = { log_prob: "change of log-probability", kl: "KL from the base" };
const texts = views.filter((view) => view.tokens);
const hasEffects = texts.some((view) => view.log_prob || view.kl);
const largest = Object.fromEntries(Object.keys(EFFECTS).map((what) => [
  what, largestOf(texts.flatMap((view) => (view[what] ?? []).map((each) => Math.abs(each ?? 0))), 1e-9),
]));

/** A word as it is read, without the marks of its parts. */
function joined(view, unit) {
  if (unit.length === 1 && !state.words) return visible(view.tokens[unit[0]]);
  const whole = unit.map((i) => view.tokens[i].replace(/^##(?=.)/, "").replace(/^[\u0120\u2581 ]+(?=\S)/, "")).join("");
  return visible(whole);
}

/** The tokens that are shown as one: those of a word, or each of them. */
function unitsOf(view) {
  if (!view.tokens || !state.words) return Array.from({ length: view.length }, (_, i) => [i]);
  const units = [];
  view.words.forEach((word, i) => (units[word] ??= []).push(i));
  return units;
}

/** Summed over the unit, as logarithms and KLs of a sequence are; null where nothing is known. */
function effect(view, what, unit) {
  const known = unit.map((i) => view[what]?.[i] ?? null).filter((each) => each !== null);
  return known.length ? sum(known) : null;
}

function drawText(view) {
  const text = element("div", { class: "text", role: "group", "aria-label": "tokens" });
  view.buttons = view.units.map((unit) => {
    const button = element("button", { type: "button", class: "token" }, joined(view, unit));
    button.classList.toggle("padding", !view.real[unit[0]]);
    text.append(button);
    if (unit.some((i) => view.tokens[i].includes("\n"))) text.append(element("br", {}));
    return button;
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
  view.buttons = view.units.map(() => element("button", { type: "button", class: "patch" }));
  view.buttons.forEach((button) => patches.append(button));
  const shaded = element("div", { class: "picture shaded" }, picture(""), patches);
  // A finger needs 24 pixels.
  shaded.style.setProperty("min-width", `${24 * view.columns}px`);
  return element(
    "div", { class: "image" },
    element("div", { class: "picture" }, picture("the picture")), element("div", { class: "scroll" }, shaded),
  );
}

function prepare(view) {
  const width = 8 * Math.ceil(view.length / 8);
  const open = bits(view.open, view.modules.length * width);
  view.isOpen = view.modules.map((_, k) => open.subarray(k * width, k * width + view.length));
  view.real = bits(view.real, view.length);
  view.levels = view.ratios ? octets(view.ratios) : null;
  view.noun = view.tokens ? "token" : "patch";
  const like = views.filter((other) => Boolean(other.tokens) === Boolean(view.tokens));
  view.summary = element("p", {});
  view.body = element("div", {});
  byId("views").append(
    element("h3", {}, view.title || `${view.tokens ? "Text" : "Image"} ${like.indexOf(view) + 1}`),
    view.summary, view.body,
  );
}

function drawView(view) {
  view.units = unitsOf(view);
  view.body.replaceChildren(view.tokens ? drawText(view) : drawImage(view));
  view.unitOf = [];
  view.units.forEach((unit, u) => unit.forEach((i) => { view.unitOf[i] = u; }));
  view.buttons.forEach((button, u) => {
    button.tabIndex = u ? -1 : 0;
    button.describe = () => describePosition(view, u);
    button.step = (right, down) => view.buttons[u + right + down * (view.columns || 1)];
    button.addEventListener("click", () => pin(views.indexOf(view), view.units[u][0]));
  });
}

/** The view's modules that count, by their place in the view. */
const placesOf = (view) =>
  [...view.modules.keys()].filter((k) => !state.chosen.size || state.chosen.has(view.modules[k]));

function countOpen(view) {
  view.places = placesOf(view);
  view.opened = new Uint32Array(view.length);
  for (const k of view.places) view.isOpen[k].forEach((bit, i) => { view.opened[i] += bit; });
}

/** Of the modules that count, those that modified a unit: the share, averaged over its tokens. */
const shareOf = (view, unit) =>
  (view.places.length ? sum(unit.map((i) => view.opened[i])) / unit.length / view.places.length : 0);

/** What r is there, averaged as a logarithm over the modules that count; null where not known. */
function ratioOf(view, unit) {
  if (!view.levels) return null;
  const levels = view.places.flatMap((k) => unit.map((i) => view.levels[k * view.length + i])).filter(Boolean);
  return levels.length ? 2 ** ((sum(levels) / levels.length - 1) / 8 - 22) : null;
}

function shade() {
  views.forEach(countOpen);
  const shares = views.flatMap((v) => v.units.filter((u) => v.real[u[0]]).map((u) => shareOf(v, u)));
  const most = state.relative ? largestOf(shares, 1e-9) : 1;
  const tops = { share: most };
  for (const what of Object.keys(EFFECTS)) {
    const found = texts.flatMap((v) => v.units.map((unit) => Math.abs(effect(v, what, unit) ?? 0)));
    tops[what] = state.words ? largestOf(found, 1e-9) : largest[what];
  }
  views.forEach((view) => shadeView(view, tops));
  drawShareLegend(tops);
}

function shadeView(view, tops) {
  const by = view.tokens && view[state.shade] ? state.shade : "share";
  let [total, real] = [0, 0];
  view.units.forEach((unit, u) => {
    const button = view.buttons[u];
    const name = view.tokens ? joined(view, unit) : "patch";
    const where = `${name}, ${placeOf(view, unit)}`;
    if (!view.real[unit[0]]) return button.setAttribute("aria-label", `${where}: padding`);
    const share = shareOf(view, unit);
    const shown = by === "share" ? share : effect(view, by, unit);
    const change = effect(view, "log_prob", unit);
    button.style.setProperty("--value", Math.min(1, Math.abs(shown ?? 0) / tops[by]));
    button.classList.toggle("unseen", !view.places.length);
    button.classList.toggle("falls", by === "log_prob" && shown < 0);
    button.classList.toggle("rises", by === "log_prob" && shown >= 0);
    if (change !== null) {
      button.classList.add(change < 0 ? "less" : "more");
      button.style.setProperty("--effect", Math.min(1, Math.abs(change) / tops.log_prob));
    }
    const parts = [`${where}: modified by ${percent(share)} % of ${plural(view.places.length, "module")}`];
    if (change !== null) parts.push(`log-probability ${signed(change)}`);
    button.setAttribute("aria-label", parts.join(", "));
    total += share * unit.length;
    real += unit.length;
  });
  const padding = view.length - real;
  const found = plural(real, view.noun) + (padding ? ` and ${count(padding)} of padding` : "");
  const modified = view.places.length
    ? `${real ? percent(total / real) : "–"} % modified on average over ${plural(view.places.length, "module")}`
    : "none of the chosen modules saw them";
  view.summary.textContent = `${found}; ${modified}${view.places.length ? together(view) : ""}`;
}

/** How openness goes with effect: Spearman's correlation over the text's tokens. */
function together(view) {
  if (!view.kl) return "";
  const known = Array.from(view.kl.keys()).filter((i) => view.real[i] && view.kl[i] !== null);
  const [a, b] = [known.map((i) => view.opened[i]), known.map((i) => view.kl[i])].map(ranks);
  const found = correlation(a, b);
  return Number.isFinite(found) ? `; rank correlation of that with KL ${signed(found)}` : "";
}

function ranks(values) {
  const order = values.map((value, i) => [value, i]).sort((p, q) => p[0] - q[0]);
  const found = [];
  for (let i = 0, j; i < order.length; i = j) {
    for (j = i; j < order.length && order[j][0] === order[i][0]; j += 1);
    for (let k = i; k < j; k += 1) found[order[k][1]] = (i + j - 1) / 2;
  }
  return found;
}

function correlation(a, b) {
  const [p, q] = [a, b].map((all) => {
    const mean = sum(all) / all.length;
    return all.map((each) => each - mean);
  });
  const dot = (x, y) => sum(x.map((each, i) => each * y[i]));
  return dot(p, q) / Math.sqrt(dot(p, p) * dot(q, q));
}

function drawShareLegend(tops) {
  const legend = byId("share-legend");
  legend.className = `legend by-${state.shade}`;
  const [low, high] = state.shade === "share"
    ? ["0 %", `${state.relative ? percent(tops.share) : 100} % of the modules${state.relative ? ", the largest share" : ""}`]
    : state.shade === "kl" ? ["0", `${short(tops.kl)} nats`]
      : [`−${short(tops.log_prob)}`, `+${short(tops.log_prob)} nats`];
  const line = hasEffects
    ? [element("i", { class: "effect less" }), "less likely than with the base",
      element("i", { class: "effect more" }), "more likely"] : [];
  legend.replaceChildren(low, element("i", {}), high, ...line);
}
