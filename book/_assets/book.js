// What the theme leaves out for readers who do not see the page.
document.addEventListener("DOMContentLoaded", () => {
  const all = (selector) => document.querySelectorAll(selector);
  for (const button of all("button.search-button, button.search-button-field, form.bd-search button")) {
    button.setAttribute("aria-label", "Search this book");
  }
  // A table's empty corner is no header.
  for (const th of all("table th")) {
    if (!th.textContent.trim() && !th.children.length) th.replaceWith(document.createElement("td"));
  }
  // What scrolls sideways must be reachable by keyboard.
  const reach = () => {
    for (const box of all(".cell_output, .pst-scrollable-table-container, .highlight pre, div.math")) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    }
  };
  window.addEventListener("load", () => setTimeout(reach, 300));
});
