"use strict";
// A series is told from the others by pointing at its name. Its first class is its own.
for (const figure of document.querySelectorAll("figure")) {
  const marks = [...figure.querySelectorAll("svg .line, svg circle")];
  for (const name of figure.querySelectorAll(".legend li")) {
    const others = marks.filter((mark) => !mark.classList.contains(name.classList[0]));
    const dim = (opacity) => others.forEach((mark) => { mark.style.opacity = opacity; });
    name.addEventListener("pointerenter", () => dim("0.12"));
    name.addEventListener("pointerleave", () => dim(""));
  }
}
