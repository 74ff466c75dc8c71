// Every word of the page in both languages; `data-text`, `data-label` and `data-hint` name them in the HTML.
const WORDS = {
  en: {
    skip: "Skip to the prompt", mode: "Mode", chat: "Chat", completion: "Completion", model: "Model", models: "Models",
    beside: "Side by side", report: "Training report", logout: "Log out", conversation: "Conversation",
    emptyTitle: "Watch every layer choose.",
    emptyText: "Each token carries a strip: one row per layer, from attention to Mamba. Point at a token, or move with the arrow keys, to read the values.",
    attention: "attention", mamba: "Mamba", scale: "Range of the colours", prompt: "Your message", hintChat: "Say something",
    hintCompletion: "Begin a text", send: "Send", stop: "Stop", settings: "Settings", temperature: "Temperature",
    maxTokens: "Tokens at most", seed: "Seed", anySeed: "any", system: "System prompt", fresh: "New conversation", live: "Server now",
    you: "You", parameters: "parameters", context: "context", layers: "layers", both: "both branches",
    gatesOf: "Gates token by token: the arrow keys move", mean: "mean", token: "token", tokens: "tokens",
    onlyMamba: "only Mamba", onlyAttention: "only attention", stopped: "stopped", tokensPerSecond: "tokens/s", cache: "cache",
    active: "active", waiting: "waiting", answered: "The answer is complete.", needsKey: "The key is no longer valid.",
    enterKey: "Enter it again", lost: "The server cannot be reached.", ended: "ended by its length",
    prunedLayers: (n) => (n === 1 ? "1 layer pruned" : `${n} layers pruned`), noneLeft: "no layer pruned",
  },
  zh: {
    skip: "跳到输入框", mode: "模式", chat: "对话", completion: "续写", model: "模型", models: "模型",
    beside: "并排比较", report: "训练报告", logout: "退出", conversation: "对话内容",
    emptyTitle: "看每一层如何选择。",
    emptyText: "每个词元下方有一条色带：一层一行，从注意力到 Mamba。指向词元，或用方向键移动，即可读到数值。",
    attention: "注意力", mamba: "Mamba", scale: "颜色范围", prompt: "输入内容", hintChat: "说点什么",
    hintCompletion: "写一个开头", send: "发送", stop: "停止", settings: "设置", temperature: "温度",
    maxTokens: "最多词元数", seed: "随机种子", anySeed: "任意", system: "系统提示", fresh: "新对话", live: "服务器现状",
    you: "你", parameters: "参数", context: "上下文", layers: "层", both: "两个分支",
    gatesOf: "逐词元的门控值：用方向键移动", mean: "平均", token: "词元", tokens: "个词元",
    onlyMamba: "仅 Mamba", onlyAttention: "仅注意力", stopped: "已停止", tokensPerSecond: "词元/秒", cache: "缓存",
    active: "进行中", waiting: "等待", answered: "回答完成。", needsKey: "密钥已失效。",
    enterKey: "重新输入", lost: "无法连接服务器。", ended: "达到长度上限",
    prunedLayers: (n) => `${n} 层已剪枝`, noneLeft: "没有剪枝的层",
  },
};

let language = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
if (!(language in WORDS)) language = "en";

export const word = (name, ...values) => {
  const found = WORDS[language][name];
  return typeof found === "function" ? found(...values) : found;
};

export const number = (value, digits = 0) =>
  new Intl.NumberFormat(language, { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);

export const compact = (value) =>
  new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);

export const bytes = (value) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) [value, place] = [value / 1024, place + 1];
  return `${number(value, value < 10 && place ? 1 : 0)} ${units[place]}`;
};

export function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const [attribute, put] of [
    ["text", (element, text) => (element.textContent = text)],
    ["label", (element, text) => element.setAttribute("aria-label", text)],
    ["hint", (element, text) => (element.placeholder = text)],
  ])
    for (const element of document.querySelectorAll(`[data-${attribute}]`)) put(element, word(element.dataset[attribute]));
  const other = document.getElementById("language");
  other.textContent = language === "zh" ? "English" : "中文";
  other.lang = language === "zh" ? "en" : "zh";
}

export function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  translate();
}
