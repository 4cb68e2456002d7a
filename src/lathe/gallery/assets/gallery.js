// Search and filters of the front page, live figures of a paper's page, light and dark, and keys.
(function () {
  "use strict";
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const theme = () => root.dataset.theme || (dark.matches ? "dark" : "light");

  // Figures: drawn with the page's theme, and again when it changes.
  const charts = [...document.querySelectorAll(".chart")];
  function draw() {
    const config = window.latheThemes && window.latheThemes[theme()];
    for (const chart of charts) {
      const spec = JSON.parse(document.getElementById(chart.dataset.spec).textContent);
      delete spec.config; // the page's theme takes its place
      window.vegaEmbed(chart, spec, { config, actions: false, renderer: "svg", tooltip: true }).then(
        () => { chart.dataset.drawn = theme(); },
        (error) => { chart.textContent = "This figure could not be drawn."; console.error(error); }
      );
    }
  }
  draw();
  dark.addEventListener("change", draw);
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("lathe-theme", root.dataset.theme); } catch (error) { /* private window */ }
    draw();
  });

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", () => {
      const code = button.parentElement.querySelector("code");
      navigator.clipboard.writeText(code.textContent).then(
        () => { button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500); },
        () => { getSelection().selectAllChildren(code); }
      );
    });
  }

  // Front page: search as you type, filter by area; both are kept in the address.
  const search = document.getElementById("search");
  if (search) {
    const cards = [...document.querySelectorAll(".card")];
    const chips = [...document.querySelectorAll(".chips button")];
    const asked = new URLSearchParams(location.hash.slice(1));
    let area = asked.get("area") || "";
    search.value = asked.get("q") || "";
    function filter() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const card of cards) {
        const fits = (!area || card.dataset.area === area) && words.every((word) => card.dataset.words.includes(word));
        card.hidden = !fits;
        shown += fits;
      }
      for (const section of document.querySelectorAll(".job")) section.hidden = !section.querySelector(".card:not([hidden])");
      for (const chip of chips) chip.setAttribute("aria-pressed", String(chip.dataset.area === area));
      document.querySelector(".nothing").hidden = shown > 0;
      document.getElementById("count").textContent = shown + (shown === 1 ? " paper" : " papers");
      const kept = new URLSearchParams();
      if (search.value) kept.set("q", search.value);
      if (area) kept.set("area", area);
      history.replaceState(null, "", kept.size ? "#" + kept : location.pathname);
    }
    search.addEventListener("input", filter);
    for (const chip of chips) chip.addEventListener("click", () => { area = chip.dataset.area; filter(); });
    document.getElementById("clear").addEventListener("click", () => { area = ""; search.value = ""; filter(); search.focus(); });
    filter();
  }

  // Keys: / searches, arrows (or j and k) walk the cards or the claims, Escape leaves the search.
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
    if (event.key === "/" && !typing && search) { event.preventDefault(); search.focus(); search.select(); return; }
    if (event.key === "Escape" && typing) { document.activeElement.blur(); return; }
    const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    if (!step || (typing && event.key.length === 1)) return;
    const stops = [...document.querySelectorAll(search ? ".card:not([hidden]) > a" : ".claim .id")];
    const at = stops.indexOf(document.activeElement);
    if (at < 0 && !typing && event.key.startsWith("Arrow")) return; // leave the page's own scrolling alone
    const next = stops[at + step] || (at < 0 ? stops[0] : null);
    if (next) { event.preventDefault(); next.focus(); next.scrollIntoView({ block: "nearest" }); }
  });
})();
