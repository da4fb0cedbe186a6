"use strict";
// What the report says is put in as text, never as markup.

const report = JSON.parse(document.getElementById("data").textContent);
const { modules, rows, columns, reports, views } = report;
const state = {
  chosen: new Set(), // of modules, by number; none stands for all of them
  pin: null, // the position whose details stay: [number of its view, its own]
  tab: "sparsity",
  shade: "share", // what a token's colour says: "share", "log_prob" or "kl"
  words: false,
  relative: false,
};
const cells = modules.map(() => []); // the buttons of each module, in all heatmaps
const groups = []; // the buttons of layers and projections, with the modules they stand for
const touch = matchMedia("(hover: none)").matches;

const byId = (id) => document.getElementById(id);
const percent = (share) => (100 * share).toFixed(1);
const count = (number) => number.toLocaleString("en");
const signed = (number) => (number < 0 ? "−" : "+") + short(Math.abs(number));
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
// Of as many as there are tokens, which are too many for the arguments of a call.
const largestOf = (numbers, least) => numbers.reduce((a, b) => Math.max(a, b), least);
const plural = (number, noun) =>
  `${count(number)} ${number === 1 ? noun : noun === "patch" ? "patches" : `${noun}s`}`;

/** A number as it is read: three digits. */
function short(number) {
  return number && Math.abs(number) < 1e-3 ? number.toExponential(1) : String(Number(number.toPrecision(3)));
}

function element(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes, ...children) {
  return filled(document.createElementNS(byId("svg").namespaceURI, tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** What a report says of a module; null where it has none of that name. */
const said = (number, which = 0) => reports[which].modules[number];

/** The modules that count. */
const counted = () => modules.map((_, n) => n).filter((n) => !state.chosen.size || state.chosen.has(n));

// Space, control characters and those of no width would not be seen.
function visible(token) {
  const shown = token.replace(/[\x00-\x1f\x7f]/g, (c) => {
    if (c === "\n") return "↵";
    if (c === "\t") return "⇥";
    return c === "\x7f" ? "␡" : String.fromCharCode(0x2400 + c.charCodeAt(0));
  });
  return /^[\s\p{Cf}]*$/u.test(shown) ? "␣".repeat(Math.max(1, shown.length)) : shown;
}
