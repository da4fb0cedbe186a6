// The tokens that the chosen modules modified most and least, over all texts

const LISTED = 10;

function ranked() {
  const found = new Map();
  for (const view of texts) {
    if (!view.places.length) continue;
    for (const unit of view.units) {
      if (!view.real[unit[0]]) continue;
      const token = joined(view, unit);
      if (!found.has(token)) found.set(token, { token, times: 0, share: 0, ratios: [], log_prob: [], kl: [] });
      const each = found.get(token);
      each.times += 1;
      each.share += shareOf(view, unit);
      const ratio = ratioOf(view, unit);
      if (ratio !== null) each.ratios.push(Math.log(ratio));
      for (const what of ["log_prob", "kl"]) {
        const known = effect(view, what, unit);
        if (known !== null) each[what].push(known);
      }
    }
  }
  const mean = (all) => (all.length ? sum(all) / all.length : null);
  return [...found.values()].map(({ token, times, share, ratios, log_prob, kl }) => ({
    token, times, share: share / times, ratio: ratios.length ? Math.exp(mean(ratios)) : null,
    log_prob: mean(log_prob), kl: mean(kl),
  })).sort((a, b) => b.share - a.share || (b.ratio ?? 0) - (a.ratio ?? 0) || b.times - a.times);
}

function drawRanking() {
  if (!texts.length) return;
  const all = ranked();
  const columnsShown = [
    ["times", (each) => count(each.times)], ["modified", (each) => `${percent(each.share)} %`],
    ...(all.some((each) => each.ratio !== null) ? [["r", (each) => (each.ratio === null ? "–" : short(each.ratio))]] : []),
    ...(hasEffects ? [["Δ log p", (each) => (each.log_prob === null ? "–" : signed(each.log_prob))],
      ["KL", (each) => (each.kl === null ? "–" : short(each.kl))]] : []),
  ];
  const table = (caption, found) => element(
    "div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    element(
      "table", { class: "ranking" }, element("caption", {}, caption),
      element("thead", {}, element(
        "tr", {}, element("th", { scope: "col" }, state.words ? "word" : "token"),
        ...columnsShown.map(([name]) => element("th", { scope: "col" }, name)),
      )),
      element("tbody", {}, ...found.map((each) => element(
        "tr", {}, element("th", { scope: "row", class: "quoted" }, each.token),
        ...columnsShown.map(([, text]) => element("td", {}, text(each))),
      ))),
    ),
  );
  byId("rankings").replaceChildren(
    table("most modified", all.slice(0, LISTED)), table("least modified", all.slice(-LISTED).reverse()),
  );
}
