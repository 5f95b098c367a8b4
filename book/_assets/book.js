// What the theme and its extensions leave out for readers who do not see the page, or have no mouse.
document.addEventListener("DOMContentLoaded", () => {
  const all = (selector) => document.querySelectorAll(selector);
  const set = (selector, attributes) => {
    for (const element of all(selector)) {
      for (const [name, value] of Object.entries(attributes)) {
        value === null ? element.removeAttribute(name) : element.setAttribute(name, value);
      }
    }
  };
  // Where a control shows a text, that text is its name. Icons drawn by a font are not read out.
  set(".search-button-field, div.cell details.hide > summary", { "aria-label": null });
  set("button i, a i, summary i", { "aria-hidden": "true" });
  const quiet = () => {
    set(".theme-switch", { title: null, "aria-hidden": "true" });
    for (const title of all(".theme-switch title")) title.remove();
  };
  quiet();
  set("div.citation-list > .citation", { role: "listitem" });
  for (const logo of all(".navbar-brand.logo")) {
    logo.parentElement.setAttribute("role", "navigation");
    logo.parentElement.setAttribute("aria-label", "Title page");
  }
  // The empty corner of a table is no header.
  for (const th of all("table th")) {
    if (!th.textContent.trim() && !th.children.length) th.replaceWith(document.createElement("td"));
  }
  // What scrolls sideways can be reached by keyboard.
  const reach = () => {
    for (const box of all(".cell_output, .pst-scrollable-table-container, .highlight pre, div.math, mjx-container")) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    }
  };
  // Again once icons have been drawn and formulas set, which change the page.
  window.addEventListener("load", () => setTimeout(() => { quiet(); reach(); }, 300));
});
