// What pages opened from a folder, readers without a mouse, and figures in frames need.

// Opened as a file, a page may not fetch its neighbours: the search shows titles without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// The explorable figures follow JupyterLab's mark of the theme.
function markTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = document.body.dataset.theme;
  document.body.dataset.jpThemeLight = String(theme === "light" || (theme !== "dark" && !dark));
}

// What scrolls sideways must also scroll by keys.
function reachScrollers() {
  for (const box of document.querySelectorAll("pre, .table-wrapper, mjx-container")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
  }
}

addEventListener("DOMContentLoaded", () => {
  markTheme();
  for (const term of document.querySelectorAll("#glossary td:nth-child(2)")) term.lang = "zh-Hans";
  // Sphinx marks the groups of its contents as headings, of no level.
  for (const group of document.querySelectorAll(".caption[role=heading]")) group.ariaLevel = "2";
  new MutationObserver(markTheme).observe(document.body, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", markTheme);
});
addEventListener("load", reachScrollers);
addEventListener("resize", reachScrollers);
