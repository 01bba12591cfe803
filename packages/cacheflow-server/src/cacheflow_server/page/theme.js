// Light or dark. It is loaded before the page is drawn, so that a chosen theme does not flash; without a choice the system's
// is taken, by the style sheet alone.
"use strict";

(() => {
  const KEY = "cacheflow-theme";
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => root.dataset.theme ?? (dark.matches ? "dark" : "light");

  try {
    const kept = localStorage.getItem(KEY);
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch {
    // A browser that keeps nothing takes the system's theme.
  }

  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => {
      button.setAttribute("aria-pressed", String(chosen() === "dark"));
      dispatchEvent(new Event("themechange"));
    };
    button.addEventListener("click", () => {
      root.dataset.theme = chosen() === "dark" ? "light" : "dark";
      try {
        localStorage.setItem(KEY, root.dataset.theme);
      } catch {
        // It holds until the page is left.
      }
      label();
    });
    dark.addEventListener("change", label);
    label();
  });
})();
