// The page: asks one model, or two beside each other, and shows the answers with their gates as they come.
import { card, live } from "./cards.js";
import { addToken, hide, newTokens, setReach, watchTokens } from "./gates.js";
import { ApiError, get, stream } from "./server.js";
import { number, switchLanguage, translate, word } from "./words.js";

const at = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
let models = [];
let mode = "chat";
let turns = []; // {question, answers: {model name: text}}
let running = null; // what ends the answers on their way

const chosen = () => {
  const first = models.find((model) => model.id === at("model").value) ?? models[0];
  if (!first || !at("beside").checked) return first ? [first] : [];
  return [first, models.find((model) => model !== first)];
};

function options() {
  const found = {};
  for (const name of NUMBERS) {
    const text = at(name).value.trim();
    if (text !== "") found[name] = Number(text);
  }
  return found;
}

function body(model, question) {
  if (mode === "completion") return ["/v1/completions", { model: model.id, prompt: question, ...options() }];
  const messages = at("system").value.trim() ? [{ role: "system", content: at("system").value.trim() }] : [];
  for (const turn of turns) {
    if (!(model.id in turn.answers)) continue;
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.answers[model.id] });
  }
  return ["/v1/chat/completions", { model: model.id, messages: [...messages, { role: "user", content: question }], ...options() }];
}

function part(className, text, tag = "p") {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function showTurn(question, asked) {
  at("empty").hidden = true;
  const turn = part("turn", undefined, "article");
  const said = part("question");
  said.append(part("who", mode === "chat" ? word("you") : word("completion"), "span"), question);
  const answers = part("answers", undefined, "div");
  turn.append(said, answers);
  const views = asked.map((model) => {
    const answer = part("answer", undefined, "div");
    const view = { text: "", tokens: newTokens(model.layers), plain: part("sr"), foot: part("foot") };
    answer.append(part("who", model.id), view.plain, view.tokens, view.foot);
    answers.append(answer);
    return view;
  });
  at("talk").append(turn);
  turn.scrollIntoView({ block: "end" });
  return views;
}

async function answer(model, question, view, signal) {
  const begin = performance.now();
  let count = 0;
  let first = 0;
  const tell = (why) => {
    const seconds = (performance.now() - first) / 1000;
    const speed = count > 1 ? ` · ${number((count - 1) / seconds, 1)} ${word("tokensPerSecond")}` : "";
    view.foot.textContent = `${number(count)} ${word("tokens")}${speed}${why ? ` · ${why}` : ""}`;
  };
  try {
    for await (const chunk of stream(...body(model, question), signal)) {
      const choice = chunk.choices[0];
      if (!choice) continue;
      const text = choice.delta?.content ?? choice.text ?? "";
      const gates = choice.gates ?? [];
      if (gates.length) first ||= performance.now();
      count += gates.length;
      for (const gate of gates) addToken(view.tokens, gate.text, gate.layers);
      if (!gates.length && text) addToken(view.tokens, text, null);
      view.text += text;
      tell(choice.finish_reason === "length" ? word("ended") : "");
      follow();
    }
  } catch (problem) {
    if (problem.name !== "AbortError") throw problem;
    tell(word("stopped"));
  } finally {
    view.plain.textContent = view.text;
    first ||= begin;
  }
}

// Keep the end in sight for whoever is there already.
function follow() {
  const talk = at("talk");
  if (talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120) talk.scrollTop = talk.scrollHeight;
}

async function ask(event) {
  event.preventDefault();
  const question = at("prompt").value;
  if (!question.trim() || running) return;
  if (!at("ask").reportValidity()) return;
  complain(null);
  running = new AbortController();
  busy(true);
  const asked = chosen();
  const views = showTurn(question, asked);
  at("prompt").value = "";
  grow();
  const results = await Promise.allSettled(asked.map((model, i) => answer(model, question, views[i], running.signal)));
  const answers = {};
  asked.forEach((model, i) => views[i].text && (answers[model.id] = views[i].text));
  if (mode === "chat") turns.push({ question, answers });
  running = null;
  busy(false);
  const broken = results.find((result) => result.status === "rejected");
  if (broken) complain(broken.reason);
  else at("told").textContent = word("answered");
  if (broken && !views.some((view) => view.text)) at("prompt").value = question; // nothing was lost
  at("prompt").focus({ preventScroll: true });
  refresh();
}

function busy(now) {
  at("send").hidden = now;
  at("stop").hidden = !now;
  at("talk").setAttribute("aria-busy", String(now));
  at("told").textContent = "";
}

function complain(problem) {
  const box = at("error");
  box.hidden = !problem;
  box.replaceChildren();
  if (!problem) return;
  if (problem.status === 401) {
    const link = document.createElement("a");
    link.href = "/";
    link.textContent = word("enterKey");
    box.append(word("needsKey"), " ", link);
  } else box.append(problem instanceof ApiError ? problem.message : word("lost"));
}

function start(newMode) {
  running?.abort();
  mode = newMode;
  turns = [];
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  at("empty").hidden = false;
  for (const name of ["chat", "completion"]) at(`mode-${name}`).setAttribute("aria-pressed", String(name === mode));
  at("system").closest("label").hidden = mode !== "chat";
  at("prompt").dataset.hint = mode === "chat" ? "hintChat" : "hintCompletion";
  hide();
  translate();
}

function showModels() {
  at("cards").replaceChildren(...chosen().map(card));
  at("cards").classList.toggle("two", chosen().length > 1);
  document.body.classList.toggle("beside", chosen().length > 1);
}

function grow() {
  const box = at("prompt");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight * 0.3)}px`;
}

async function refresh() {
  if (document.hidden) return;
  try {
    live(at("live"), await get("/stats"), chosen().map((model) => model.id));
  } catch (problem) {
    if (!running) complain(problem);
  }
}

function listen() {
  at("ask").addEventListener("submit", ask);
  at("stop").addEventListener("click", () => running?.abort());
  at("fresh").addEventListener("click", () => start(mode));
  for (const name of ["chat", "completion"]) at(`mode-${name}`).addEventListener("click", () => start(name));
  for (const id of ["model", "beside"]) at(id).addEventListener("change", () => (showModels(), start(mode), refresh()));
  at("scale").addEventListener("change", () => setReach(Number(at("scale").value)));
  at("language").addEventListener("click", () => (switchLanguage(), showModels(), refresh()));
  at("prompt").addEventListener("input", grow);
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    at("ask").requestSubmit();
  });
  watchTokens(at("talk"));
}

async function open() {
  translate();
  listen();
  try {
    const [known, settings] = await Promise.all([get("/v1/models"), get("/page-settings")]);
    models = known.data;
    at("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    at("beside-box").hidden = models.length < 2;
    at("report").hidden = !settings.report;
    at("logout").hidden = !settings.key;
    showModels();
    await refresh();
    setInterval(refresh, 1500);
  } catch (problem) {
    complain(problem);
  }
  document.body.dataset.ready = "yes";
}

open();
