// All is there: draw it, and listen

for (const [name, there] of Object.entries({ r: has("ratios"), course: has("places") })) {
  if (!there) for (const id of [`tab-${name}`, `panel-${name}`]) byId(id).remove();
}
document.body.classList.toggle("two", reports.length > 1);
views.forEach(prepare);
byId("samples").hidden = !views.length;
byId("ranking").hidden = !texts.length;
byId("words").closest("label").hidden = !texts.some(({ words, length }) => words.at(-1) < length - 1);
byId("shade").closest("label").hidden = !hasEffects;
if (!texts.length) byId("files").querySelector('[data-file="tokens.csv"]').hidden = true;

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.addEventListener("click", () => { state.tab = tab.id.slice("tab-".length); showAll(); });
}
for (const button of byId("files").querySelectorAll("button")) {
  const name = button.dataset.file;
  button.addEventListener("click", () => save(name, FILES[name][0], FILES[name][1]()));
}
byId("shade").addEventListener("change", (event) => { state.shade = event.target.value; showAll(); });
byId("relative").addEventListener("change", (event) => { state.relative = event.target.checked; showAll(); });
byId("words").addEventListener("change", (event) => {
  state.words = event.target.checked;
  views.forEach(drawView);
  showAll();
});
byId("all").addEventListener("click", () => { state.chosen.clear(); showAll(); });
byId("release").addEventListener("click", () => { state.pin = null; showAll(); });
document.addEventListener("pointerover", describe);
document.addEventListener("focusin", describe);
document.addEventListener("keydown", walk);
addEventListener("hashchange", recall);
recall();
