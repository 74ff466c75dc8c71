"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text");
const tokens = [...text.querySelectorAll(".t")];
const rows = data.layers.map((layer) => document.getElementById("layer-" + layer));
let current = 0;

function average(token) {
  return data.mean.reduce((sum, layer) => sum + layer[token], 0) / data.mean.length;
}

// What the tints show: all layers' mean, or one layer. The furthest from 0.5 has the full colour.
function tint(layer) {
  const values = tokens.map((_, i) => (layer < 0 ? average(i) : data.mean[layer][i]));
  const most = Math.max(0.02, ...values.map((value) => Math.abs(value - 0.5)));
  values.forEach((value, i) => {
    tokens[i].style.setProperty("--side", value < 0.5 ? "var(--attention)" : "var(--mamba)");
    tokens[i].style.setProperty("--tint", (Math.abs(value - 0.5) / most).toFixed(3));
  });
  document.getElementById("scale").textContent = "full colour at 0.5 ± " + most.toFixed(3);
}

function show(i) {
  tokens[current].setAttribute("aria-pressed", "false");
  tokens[i].setAttribute("aria-pressed", "true");
  current = i;
  document.getElementById("which").textContent = data.names[i];
  document.getElementById("about").textContent =
    "token " + i + ", " + data.classes[i] + ", mean gate " + average(i).toFixed(3);
  rows.forEach((row, n) => {
    const value = data.mean[n][i], spread = data.std[n][i];
    const low = Math.max(0, value - spread), high = Math.min(1, value + spread);
    row.classList.add("on");
    row.querySelector("b").style.left = 100 * value + "%";
    row.querySelector("i").style.left = 50 * (low + high) + "%";
    row.querySelector("i").style.width = 100 * (high - low) + "%";
    row.querySelector("output").textContent = value.toFixed(3);
  });
}

function move(i) {
  const to = Math.min(Math.max(i, 0), tokens.length - 1);
  tokens[current].tabIndex = -1;
  tokens[to].tabIndex = 0;
  tokens[to].focus();
}

for (const kind of ["pointerover", "focusin", "click"]) {
  text.addEventListener(kind, (event) => {
    const token = event.target.closest(".t");
    if (token) show(Number(token.dataset.i));
  });
}
text.addEventListener("keydown", (event) => {
  const steps = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: tokens.length - 1 };
  if (event.key in steps) {
    event.preventDefault();
    move(steps[event.key]);
  }
});
document.getElementById("by").addEventListener("change", (event) => tint(Number(event.target.value)));
tint(-1);
