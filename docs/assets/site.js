// Tables that are wider than the page scroll by themselves: let the keyboard reach them.
addEventListener("load", () => {
  for (const wide of document.querySelectorAll(".md-typeset__scrollwrap")) wide.tabIndex = 0;
});
