// What each model is: its size, and a map of its layers with what was pruned.
import { bytes, compact, number, word } from "./words.js";

const BRANCHES = ["mamba", "attention"];
const element = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

const pruned = (model) => model.layers.filter((branches) => branches.length < 2).length;

export function card(model) {
  const made = element("article", "card");
  const facts = `${compact(model.parameters)} ${word("parameters")} · ${word("context")} ${number(model.max_model_len)} · ${model.dtype}`;
  const count = pruned(model);
  made.append(element("h2", "", model.id), element("p", "facts", facts), map(model.layers));
  made.append(element("p", "facts", count ? word("prunedLayers", count) : word("noneLeft")));
  return made;
}

// Two rows, Mamba above attention, a column per layer; a branch that is gone is hollow.
function map(layers) {
  const made = element("div", "map");
  made.setAttribute("role", "img");
  const told = layers.map((branches, layer) => {
    const what = branches.length === 2 ? "both" : branches[0] === "mamba" ? "onlyMamba" : "onlyAttention";
    return `${layer + 1}: ${word(what)}`;
  });
  made.setAttribute("aria-label", `${word("layers")}: ${told.join(", ")}`);
  layers.forEach((branches, layer) => {
    const column = element("span");
    column.title = told[layer];
    for (const branch of BRANCHES) column.append(element("i", branches.includes(branch) ? branch : "gone"));
    made.append(column);
  });
  return made;
}

// The server's figures for the models on the screen.
export function live(list, stats, names) {
  const sum = (key) => names.reduce((total, name) => total + (stats[name]?.[key] ?? 0), 0);
  const facts = [
    ["tokensPerSecond", number(sum("tokens_per_second"), 1)],
    ["cache", bytes(sum("state_bytes") + sum("prefix_bytes"))],
    ["active", `${sum("active") + sum("prefilling")}/${sum("slots")}`],
  ];
  if (sum("waiting")) facts.push(["waiting", number(sum("waiting"))]);
  list.replaceChildren(
    ...facts.map(([name, value]) => {
      const pair = element("div");
      pair.append(element("dt", "", word(name)), element("dd", "", value));
      return pair;
    }),
  );
}
