"use strict";
// A series is seen alone by pointing at its name, whose class its line and marks have too.
for (const panel of document.querySelectorAll(".panel")) {
  const marks = [...panel.querySelectorAll(":scope > svg :is(.line, .mark)")];
  for (const name of panel.querySelectorAll(".legend li")) {
    const others = marks.filter((mark) => !mark.classList.contains(name.className));
    const dim = (opacity) => others.forEach((mark) => { mark.style.opacity = opacity; });
    name.addEventListener("pointerenter", () => dim("0.12"));
    name.addEventListener("pointerleave", () => dim(""));
  }
}
