// r and tau, and the course over the sequence: drawn anew for the modules that are chosen

const [LEFT, BOTTOM] = [44, 34];
const WIDTHS = { chart: 520, strip: 330, aside: 300 }; // about as wide as they are seen, for the text's sake

const has = (what) => reports.some((r) => r.modules.some((m) => m && m[what]));

/** A chart of this size, with ticks of x, [place, label], and of y, where there are some. */
function frame(width, height, label, ticksX, titleX, ticksY, ...children) {
  const low = height - BOTTOM;
  return drawn(
    "svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    ...ticksY.flatMap(([y, text]) => [
      drawn("line", { class: "grid", x1: LEFT, x2: width - 8, y1: y, y2: y }),
      drawn("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, text),
    ]),
    ...ticksX.flatMap(([x, text]) => [
      drawn("line", { class: "grid", x1: x, x2: x, y1: low, y2: low + 4 }),
      drawn("text", { x, y: low + 16, "text-anchor": "middle" }, text),
    ]),
    drawn("line", { class: "axis", x1: LEFT, x2: width - 8, y1: low, y2: low }),
    drawn("text", { x: (LEFT + width) / 2, y: height - 3, "text-anchor": "middle" }, titleX),
    ...children,
  );
}

/** Where r lies on the axes of all charts of r: all of it, and tau unless it is far away. */
function ratioAxis(width) {
  const found = reports.flatMap((r) => r.modules.filter((m) => m?.ratios).map((m) => m.ratios));
  const { first, octave } = reports[0].edges;
  const inner = (bins) => [Math.max(1, bins[0]), bins[0] + bins.length - 1];
  const bin = (r) => 1 + octave * Math.log2(r / first);
  const marks = taus.filter((tau) => tau > 0).map(bin);
  const [low, high] = [found.map((bins) => inner(bins)[0]), found.map((bins) => inner(bins)[1])];
  const far = 4 * octave;
  const from = Math.min(...low, ...marks.filter((b) => b > Math.min(...low) - far).map(Math.floor));
  const to = Math.max(from + 1, ...high, ...marks.filter((b) => b < Math.max(...high) + far).map(Math.ceil));
  const scale = (width - 8 - LEFT) / (to - from);
  const x = (b) => LEFT + scale * (Math.min(Math.max(b, from), to) - from);
  const ticks = [];
  const digits = to - from > 8 * octave ? [1] : [1, 2, 5]; // more than two decades have room for these
  for (let e = -7; e <= 5; e += 1) {
    for (const digit of digits) {
      const r = Number(`${digit}e${e}`);
      if (bin(r) >= from && bin(r) <= to) ticks.push([x(bin(r)), short(r)]);
    }
  }
  return { width, x, bin, ticks, scale };
}

const tauMark = (axis, tau, y1, y2) => {
  const at = Number(tau ?? NaN);
  if (!(at > 0)) return [];
  return [drawn("line", { class: "tau", x1: axis.x(axis.bin(at)), x2: axis.x(axis.bin(at)), y1, y2 })];
};

/** The r of these modules together, with the tau of each marked. */
function ratioBars(axis, numbers, which, height) {
  const found = numbers.map((n) => said(n, which)).filter((m) => m?.ratios);
  const bins = new Map();
  for (const { ratios: [first, ...counts] } of found) {
    counts.forEach((n, i) => bins.set(first + i, (bins.get(first + i) ?? 0) + n));
  }
  const top = Math.max(1, ...bins.values());
  const [low, total] = [height - BOTTOM, sum([...bins.values()])];
  let [seen, median] = [0, null];
  for (const b of [...bins.keys()].sort((p, q) => p - q)) {
    seen += bins.get(b);
    if (median === null && 2 * seen >= total) median = b;
  }
  const { first, octave } = reports[which].edges;
  const half = median === null ? "no r" : `half of them below ${short(first * 2 ** (median / octave))}`;
  const label = `r of ${plural(found.length, "module")}, ${plural(total, "position")}: ${half}`;
  return frame(
    axis.width, height, label, axis.ticks, "r = ‖M(x)‖ / ‖W0 x‖", [],
    ...[...bins].filter(([, n]) => n).map(([b, n]) => drawn("rect", {
      class: "bar", x: axis.x(b), width: Math.max(1, axis.scale - 1),
      y: low - ((low - 8) * n) / top, height: ((low - 8) * n) / top,
    })),
    ...found.flatMap((m) => tauMark(axis, m.tau, 4, low)),
  );
}

/** A line of darker and lighter bins for each layer of a projection. */
function ratioStrips(axis, column, which) {
  const numbers = modules.map((_, n) => n).filter((n) => modules[n].column === column && said(n, which)?.ratios);
  const shown = new Set(counted());
  const strips = numbers.map((n, y) => {
    const { ratios: [first, ...counts], tau, sparsity } = said(n, which);
    const top = Math.max(...counts);
    const told = `${modules[n].name}: tau ${tau ?? "none"}, sparsity ${percent(sparsity)} %`;
    return drawn(
      "g", shown.has(n) ? {} : { class: "faint" }, drawn("title", {}, told),
      drawn("text", { x: LEFT - 6, y: 16 * y + 16, "text-anchor": "end" }, rows[modules[n].row]),
      ...counts.flatMap((k, i) => (k === 0 ? [] : [drawn("rect", {
        class: "bar", x: axis.x(first + i), width: axis.scale, y: 16 * y + 5, height: 14,
        "fill-opacity": (k / top).toFixed(2),
      })])),
      ...tauMark(axis, tau, 16 * y + 4, 16 * y + 20),
    );
  });
  const label = `r of ${columns[column]} in ${plural(numbers.length, "layer")}, tau marked`;
  return numbers.length ? [element(
    "figure", {}, element("figcaption", {}, columns[column]),
    frame(axis.width, 16 * numbers.length + 8 + BOTTOM, label, axis.ticks, "r", [], ...strips),
  )] : [];
}

function drawRatios(panel) {
  const [axis, small] = [ratioAxis(WIDTHS.chart), ratioAxis(WIDTHS.strip)];
  panel.replaceChildren(
    element("p", {}, "How often r is where, of all chosen modules together and of each; the lines are tau. ",
      "What lies left of its own tau is left unmodified."),
    element("div", { class: "beside" }, ...reports.map((found, which) => element(
      "div", {}, ...(reports.length > 1 ? [element("h3", {}, found.name)] : []),
      ratioBars(axis, counted(), which, 150),
      element("div", { class: "strips" }, ...columns.flatMap((_, c) => ratioStrips(small, c, which))),
    ))),
  );
}

/** The share of modified positions at each place in the sequence, [first place, share]. */
function course(which) {
  const { width, positions } = reports[which].places;
  const found = counted().map((n) => said(n, which)).filter((m) => m?.places);
  const all = [];
  for (const { places: [kind, ...modified] } of found) {
    modified.forEach((n, i) => {
      all[i] ??= [0, 0];
      all[i][0] += n;
      all[i][1] += positions[kind][i];
    });
  }
  return all.map(([n, of], i) => [1 + i * width, of ? n / of : 0]);
}

function drawCourse(panel) {
  const found = reports.map((_, which) => course(which));
  const last = Math.max(2, ...found.flat().map(([place]) => place));
  const [height, top] = [240, 12];
  const x = (place) => LEFT + ((WIDTHS.chart - 12 - LEFT) * (place - 1)) / (last - 1);
  const y = (share) => height - BOTTOM - (height - BOTTOM - top) * share;
  const step = 10 ** Math.floor(Math.log10(last));
  const places = [1, ...Array.from({ length: 9 }, (_, i) => step * (i + 1)).filter((p) => p > 1 && p <= last)];
  const path = (points) => points.map(([p, s], i) => `${i ? "L" : "M"}${x(p).toFixed(1)} ${y(s).toFixed(1)}`).join("");
  const end = (points) => (points.length ? `${percent(points[0][1])} % at place 1 to ${percent(points.at(-1)[1])} % at place ${count(points.at(-1)[0])}` : "not known");
  const label = found.map((points, i) => `${reports.length > 1 ? `${reports[i].name}: ` : ""}${end(points)}`).join("; ");
  panel.replaceChildren(
    element("p", {}, "The share of positions that were modified at each place in the sequence, padding not counted."),
    frame(
      WIDTHS.chart, height, `modified positions, from ${label}`, places.map((p) => [x(p), count(p)]),
      "place in the sequence", [0, 0.25, 0.5, 0.75, 1].map((s) => [y(s), `${100 * s} %`]),
      ...found.map((points, i) => drawn("path", { class: `curve of-${i}`, d: path(points) })),
    ),
    ...(reports.length > 1 ? [element("div", { class: "legend" }, ...reports.flatMap(
      ({ name }, i) => [element("i", { class: `line of-${i}` }), name],
    ))] : []),
  );
}
