// What is on the page as files

/** As `to_csv` does it: what a spreadsheet would compute is text there. */
function csvField(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^\s*[=+\-@\uff1d\uff0b\uff0d\uff20]/.test(value) ? `'${value}` : value;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const csv = (lines) => lines.map((line) => `${line.map(csvField).join(",")}\n`).join("");

function modulesCsv() {
  const found = reports.flatMap(({ name }, which) => modules.flatMap((module, n) => {
    const m = said(n, which);
    if (!m) return [];
    const tau = m.tau === null ? null : Number(m.tau.replace("inf", "Infinity"));
    return [[...(reports.length > 1 ? [name] : []), module.name, m.sparsity, m.samples, m.positions, m.modified, tau]];
  }));
  return csv([[...(reports.length > 1 ? ["report"] : []), "module", "sparsity", "samples", "positions", "modified", "tau"], ...found]);
}

/** One line for each token, which is quoted as in JSON, so that all of it is seen. */
function tokensCsv() {
  const found = texts.flatMap((view, v) => view.tokens.map((token, i) => [
    v, i, JSON.stringify(token), view.words[i], view.real[i],
    view.real[i] ? view.opened[i] : null, view.places.length,
    view.log_prob?.[i] ?? null, view.kl?.[i] ?? null,
  ]));
  const head = ["text", "position", "token", "word", "real", "modified_by", "of_modules", "log_prob_change", "kl"];
  return csv([head, ...found]);
}

function everything() {
  const named = (list) => Object.fromEntries(list.flatMap((m, n) => (m ? [[modules[n].name, m]] : [])));
  return JSON.stringify({
    title: document.title,
    reports: reports.map(({ name, about, sparsity, modules: own }) => ({ name, about, sparsity, modules: named(own) })),
    texts: texts.map((view) => ({
      title: view.title, tokens: view.tokens, real: [...view.real].map(Boolean), words: view.words,
      log_prob_change: view.log_prob, kl: view.kl,
      modified: Object.fromEntries(view.modules.map((n, k) => [
        modules[n].name, [...view.isOpen[k].keys()].filter((i) => view.isOpen[k][i]),
      ])),
    })),
  }, null, 1);
}

function save(name, type, text) {
  const stem = document.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "report";
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: `${stem}-${name}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const FILES = {
  "modules.csv": ["text/csv", modulesCsv], "tokens.csv": ["text/csv", tokensCsv],
  "report.json": ["application/json", everything],
};
