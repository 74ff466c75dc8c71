// Tokens with their gates: a strip under each, one row per layer; a panel with the values of the one pointed at.
import { number, word } from "./words.js";

const STRIP = 44; // pixels for all layers together, as far as a row has at least two
const panel = document.getElementById("values");
let reach = 0.5; // the distance from 0.5 that has the full colour
let shown = null;

// 1 is all Mamba, 0 all attention.
export function colour(gate) {
  const strength = Math.round(Math.min(1, Math.abs(gate - 0.5) / reach) * 100);
  return `color-mix(in oklab, var(${gate >= 0.5 ? "--mamba" : "--attention"}) ${strength}%, var(--middle))`;
}

function strip(layers) {
  const height = Math.max(2, Math.floor(STRIP / layers.length));
  const rows = layers.map((gate, row) => {
    const tint = gate === null ? "var(--none)" : colour(gate);
    return `${tint} ${row * height}px ${(row + 1) * height}px`;
  });
  return { height: `${layers.length * height}px`, background: `linear-gradient(to bottom, ${rows.join(", ")})` };
}

function paint(token) {
  Object.assign(token.lastChild.style, strip(token.layers));
}

export function setReach(value) {
  reach = value;
  for (const token of document.querySelectorAll(".token")) if (token.layers) paint(token);
}

// An empty view of one answer; `branches`: the layers of its model.
export function newTokens(branches) {
  const view = document.createElement("div");
  view.className = "tokens";
  view.setAttribute("role", "toolbar");
  view.setAttribute("aria-label", word("gatesOf"));
  view.branches = branches;
  return view;
}

export function addToken(view, text, layers) {
  const token = document.createElement("span");
  token.className = "token";
  const label = document.createElement("span");
  label.className = "text";
  label.textContent = text.replaceAll("\n", "↵");
  token.append(label);
  if (layers) {
    token.layers = layers;
    token.text = text;
    token.append(document.createElement("i"));
    paint(token);
    token.tabIndex = view.querySelector(".token[tabindex]") ? -1 : 0;
    token.setAttribute("role", "button");
    token.setAttribute("aria-label", `${text.trim() || word("token")}: ${word("mean")} ${number(mean(layers), 2)}`);
  }
  if (/^\n./s.test(text)) view.append(document.createElement("br"));
  wordFor(view, text).append(token);
  if (text.endsWith("\n")) view.append(document.createElement("br"));
}

// Lines break between words: tokens of one word stand together.
function wordFor(view, text) {
  const last = view.lastElementChild;
  const joins = last?.className === "word" && /^[\p{L}\p{N}\p{P}]/u.test(text) && !/^[\p{Script=Han}]/u.test(text);
  if (joins || (text === "" && last?.className === "word")) return last;
  const made = document.createElement("span");
  made.className = "word";
  view.append(made);
  return made;
}

const mean = (layers) => {
  const known = layers.filter((gate) => gate !== null);
  return known.length ? known.reduce((sum, gate) => sum + gate, 0) / known.length : NaN;
};

function show(token) {
  if (shown === token) return;
  hide();
  shown = token;
  token.classList.add("shown");
  const known = token.layers.some((gate) => gate !== null);
  const title = document.createElement("p");
  const quoted = document.createElement("b");
  quoted.textContent = JSON.stringify(token.text).slice(1, -1).replaceAll(" ", "␣") || "…";
  title.append(quoted, known ? ` ${word("mean")} ${number(mean(token.layers), 3)}` : "");
  const list = document.createElement("ol");
  const branches = token.closest(".tokens").branches;
  token.layers.forEach((gate, layer) => list.append(row(gate, branches[layer])));
  panel.replaceChildren(title, list);
  panel.hidden = false;
  token.setAttribute("aria-describedby", "values");
  place(token);
}

function row(gate, branches) {
  const item = document.createElement("li");
  const value = document.createElement("span");
  if (gate === null) {
    value.textContent = word(branches?.[0] === "mamba" ? "onlyMamba" : "onlyAttention");
    value.className = "only";
    item.append(value);
    return item;
  }
  const bar = document.createElement("i");
  const mark = document.createElement("b");
  mark.style.left = `${gate * 100}%`;
  mark.style.background = colour(gate);
  bar.append(mark);
  value.textContent = number(gate, 3);
  item.append(bar, value);
  return item;
}

function place(token) {
  const at = token.getBoundingClientRect();
  const size = panel.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left + at.width / 2 - size.width / 2), innerWidth - size.width - 8);
  const above = at.top - size.height - 8;
  panel.style.left = `${left}px`;
  panel.style.top = `${above > 8 ? above : Math.min(at.bottom + 8, innerHeight - size.height - 8)}px`;
}

export function hide() {
  shown?.classList.remove("shown");
  shown?.removeAttribute("aria-describedby");
  shown = null;
  panel.hidden = true;
}

const tokenAt = (event) => {
  const token = event.target.closest?.(".token");
  return token?.layers ? token : null;
};

function move(event) {
  const token = tokenAt(event);
  if (event.key === "Escape") hide();
  if (!token) return;
  const all = [...token.closest(".tokens").querySelectorAll(".token[tabindex]")];
  const here = all.indexOf(token);
  const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  const target = all[Math.min(Math.max(0, next), all.length - 1)];
  token.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
}

export function watchTokens(talk) {
  talk.addEventListener("pointerover", (event) => (tokenAt(event) ? show(tokenAt(event)) : hide()));
  talk.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  talk.addEventListener("focusin", (event) => tokenAt(event) && show(tokenAt(event)));
  talk.addEventListener("focusout", hide);
  document.addEventListener("keydown", move);
  document.addEventListener("scroll", hide, { passive: true, capture: true });
}
