"""The parts of a run report, each a function from what was read to HTML."""

from __future__ import annotations

import math

from fusiontree.deploy.plan import BRANCHES, LayerPlan, PrunePlan
from fusiontree.lab.markup import ABSENT, absent, bar, duration, esc, figure, fixed, scaled, section, table, tag
from fusiontree.lab.run_folder import Row, RunFolder, alarms, number, series

SPIKES, DOCUMENTS = 20, 4  # rows of the table of spikes, and names of documents in each
NAMES = {"mamba": "Mamba", "attention": "attention", "both": "both"}
FIGURES = {
    "loss": ("Loss", "Cross entropy of the next token. Pale: every step; blue: running mean; green: held-out text."),
    "learning_rate": ("Learning rate", "Warm-up, then decay."),
    "throughput": ("Throughput", "Training tokens per second."),
    "gradient_norm": ("Gradient norm", "Before clipping. Spikes point at instability."),
    "perplexity": ("Perplexity by context", "The same held-out text in rows of each length."),
    "recall": ("Recall", "Share of values that the model finds again by their keys, among so many pairs."),
    "gate_heatmap": ("Gates while training", "Mean gate of each layer. Orange leans on attention, green on Mamba."),
    "gate_distribution": ("Gates at the end", "How often each gate value occurs; dot: mean, line: 5% to 95%."),
    "gate_by_class": ("Gates by kind of token", "Mean gate of each layer at the end, on each kind of token."),
    "healing": ("Healing", "Loss of the pruned model while it learns from the full one."),
    "branch_norms": ("Branch outputs while training", "Bold: mean over layers. A branch near zero has gone silent."),
    "branch_norms_by_layer": ("Branch outputs by layer", "Far apart: one branch speaks much louder than the other."),
}
MODEL_FACTS = {
    "num_hidden_layers": "Layers",
    "hidden_size": "Hidden size",
    "num_attention_heads": "Attention heads",
    "num_key_value_heads": "Key-value heads",
    "global_heads": "Global heads",
    "sliding_window": "Window",
    "mamba_d_state": "SSM state",
    "mamba_head_dim": "SSM head size",
    "gate_rank": "Gate rank",
    "srte": "SRTE",
    "norm_placement": "Norms",
    "vocab_size": "Vocabulary",
}


def head(run: RunFolder, parameters: int | None) -> str:
    """Title, one sentence, and tiles with the numbers a reader wants first."""
    last = run.training[-1] if run.training else {}
    trained = [f"{int(number(last, 'step')):,} steps"] if last else []
    if not math.isnan(number(last, "tokens")):
        trained.append(f"{scaled(number(last, 'tokens'))} tokens")
    if not math.isnan(number(last, "elapsed")):
        trained.append(duration(number(last, "elapsed")))
    sentence = "Trained for " + ", ".join(trained) + "." if trained else "Not trained yet."
    if run.state.get("state") == "failed":
        sentence += f" Failed: {esc(run.state.get('error', 'no reason is known'))}"
    elif run.summary.get("interrupted") is True:
        sentence += " Interrupted: training again in this folder goes on from here."
    tiles = "".join(_tile(*tile) for tile in _tiles(run, parameters))
    title = f'<p class="eyebrow">FusionTree run</p><h1>{esc(run.path.resolve().name)}</h1>'
    return f'<header>{title}<p class="lead">{sentence}</p><div class="tiles">{tiles}</div></header>'


def _tile(label: str, value: str, note: str) -> str:
    return tag("div", tag("span", label, "label") + tag("b", value) + tag("span", note, "note"), "tile")


def _tiles(run: RunFolder, parameters: int | None) -> list[tuple[str, str, str]]:
    tiles = []
    if parameters is not None:
        tiles.append(("Parameters", scaled(parameters), f"{parameters:,}"))
    _, checked = series(run.validation, "validation_loss")
    if len(checked):
        before = number(run.summary, "validation_loss_before")
        note = "nats per token" if math.isnan(before) else f"before training: {before:.3f}"
        tiles.append(("Validation loss", f"{checked[-1]:.3f}", note))
        tiles.append(("Perplexity", scaled(math.exp(min(checked[-1], 700))), "on held-out text"))
    _, gates = series(run.training, "gate_mean")
    if len(gates):
        tiles.append(("Mean gate", f"{gates[-1]:.2f}", "1 = all Mamba"))
    if len(run.slim) > 1:
        tiles += _slim_tiles(run.slim[0], run.slim[-1])
    return tiles


def _slim_tiles(first: Row, last: Row) -> list[tuple[str, str, str]]:
    tiles = []
    for key, label in (("parameters", "Size after pruning"), ("decode_tokens_per_second", "Decoding speed")):
        if not math.isnan(change := _relative(last, first, key)):
            tiles.append((label, _percent(change), f"{esc(last.get('name'))} against {esc(first.get('name'))}"))
    return tiles


def _relative(row: Row, base: Row, key: str) -> float:
    return number(row, key) / number(base, key) - 1 if number(base, key) else math.nan


def _percent(change: float) -> str:
    return f"{100 * change:+.1f}%".replace("-", "−")


def before_after(run: RunFolder, svgs: dict[str, str]) -> str:
    """The table full / pruned / healed with the export's proof and the healing curve."""
    title = "Before and after pruning"
    if not run.slim:
        message = "No <code>slim.json</code> here yet: prune, export and measure to compare the models."
        return section(title, "", absent(message))
    lead = "The same measurements on every model, on this machine, taken in turns."
    body = _comparison(run.slim)
    if not math.isnan(error := number(run.export, "relative_error")):
        proof = f"largest relative difference of the logits {error:.1e}" if error else "the logits agree bit for bit"
        body += tag("p", f"The export equals the original with its branches masked: {proof}.", "lead")
    if "healing" in svgs:
        body += tag("div", _figure("healing", svgs["healing"]), "grid single")
    return section(title, lead, body)


def _comparison(models: list[Row]) -> str:
    """One row per model, each cell with its change against the first."""
    columns = [
        ("parameters", "Parameters", scaled, -1),
        ("bytes", "Weights", lambda value: scaled(value, "B"), -1),
        ("validation_loss", "Validation loss", fixed, -1),
        ("prefill_tokens_per_second", "Prefill, tokens/s", lambda value: fixed(value, 0), 1),
        ("decode_tokens_per_second", "Decode, tokens/s", lambda value: fixed(value, 1), 1),
    ]
    rows = []
    for row in models:
        cells = [tag("b", esc(row.get("name", "?")))]
        for key, _, write, better in columns:
            most = max((number(other, key) for other in models if not math.isnan(number(other, key))), default=1.0)
            value = number(row, key)
            delta = "" if row is models[0] else _change(row, models[0], key, better)
            cells.append(write(value) + delta + bar(value / most if most else math.nan, "accent"))
        rows.append(cells)
    return table(["Model", *(label for _, label, _, _ in columns)], rows, "numbers")


def _change(row: Row, base: Row, key: str, better: int) -> str:
    absolute = key == "validation_loss"
    change = number(row, key) - number(base, key) if absolute else _relative(row, base, key)
    if math.isnan(change):
        return ""
    mood = "same" if abs(change) < 5e-4 else "good" if change * better > 0 else "bad"
    return f' <small class="{mood}">{fixed(change, 4, sign=True) if absolute else _percent(change)}</small>'


def pictures(title: str, lead: str, names: list[str], svgs: dict[str, str], missing: str) -> str:
    """A section of figures side by side; `missing` is the line shown when none could be drawn."""
    cards = [_figure(name, svgs[name]) for name in names if name in svgs]
    gone = [FIGURES[name][0].lower() for name in names if name not in svgs]
    body = tag("div", "".join(cards), "grid") if cards else absent(missing)
    if cards and gone:
        body += absent("Not recorded in this run: " + ", ".join(gone) + ".")
    return section(title, lead, body)


def _figure(name: str, svg: str) -> str:
    title, caption = FIGURES[name]
    return figure(title, svg, caption)


def alarm_list(run: RunFolder) -> str:
    """What the gate monitor complained about, with its advice."""
    if not run.gates:
        return section("Alarms", "", absent("The gates were not watched: <code>gates.jsonl</code> is not here."))
    found = alarms(run.gates)
    if not found:
        return section("Alarms", "", tag("p", "None: no gate got stuck, collapsed or fell silent.", "allgood"))
    groups: dict[tuple[str, str], list[Row]] = {}
    for alarm in found:
        groups.setdefault((str(alarm.get("kind", "alarm")), str(alarm.get("advice", ""))), []).append(alarm)
    items = ""
    for (kind, advice), members in groups.items():
        lines = "".join(tag("p", f"{esc(alarm.get('message', ''))} {_when(alarm)}") for alarm in members)
        items += tag("li", f"<b>{esc(kind)}</b>{lines}" + tag("p", esc(advice), "advice"))
    return section("Alarms", "Raised by the gate monitor while training.", tag("ul", items, "alarms"))


def spike_list(run: RunFolder) -> str:
    """Steps whose loss stood out, with the text that was in them; nothing where there were none."""
    if not run.spikes:
        return ""
    rows = []
    for row in run.spikes[:SPIKES]:
        documents = row.get("documents")
        places = [str(place) for place in documents] if isinstance(documents, list) else []
        times = number(row, "loss") / number(row, "usual_loss") if number(row, "usual_loss") else math.nan
        more = f" and {len(places) - DOCUMENTS:,} more" if len(places) > DOCUMENTS else ""
        figures = [fixed(number(row, "loss")), fixed(number(row, "usual_loss")), fixed(times, 1)]
        norms = [fixed(number(row, "grad_norm"), 2), fixed(number(row, "usual_grad_norm"), 2)]
        rows.append([f"{int(number(row, 'step')):,}", *figures, *norms, esc(", ".join(places[:DOCUMENTS])) + more])
    heads = ["Step", "Loss", "Usual loss", "Times", "Gradient norm", "Usual norm", "Text of the step"]
    lead = "Steps whose loss stood far above the usual. All of their text is named in <code>spikes.jsonl</code>."
    body = table(heads, rows, "plan")
    if len(run.spikes) > SPIKES:
        body += tag("p", f"{len(run.spikes) - SPIKES:,} more are in <code>spikes.jsonl</code>.")
    return section("Loss spikes", lead, body)


def _when(alarm: Row) -> str:
    steps = f"steps {alarm['first_step']} to {alarm['last_step']}, {alarm['times']} records"
    return tag("small", esc(steps))


def prune_plan(plan: PrunePlan | None) -> str:
    """Which branches stay, why, and what each removal was measured to cost."""
    if plan is None:
        message = "No usable <code>plan.json</code> here: <code>fusiontree prune</code> makes one."
        return section("Prune plan", "", absent(message))
    heads = ["Layer", "Keep", "Mean gate", "Without Mamba", "Without attention", "Saves", "Why"]
    rows = [_plan_row(entry) for entry in plan.layers]
    body = _tree(plan) + table(heads, rows, "plan")
    return section("Prune plan", _plan_sentence(plan), body)


def _plan_sentence(plan: PrunePlan) -> str:
    removed = [entry for entry in plan.layers if entry.keep != "both"]
    saved = sum(entry.bytes_saved for entry in removed)
    parts = [f"{len(removed)} of {plan.model.num_hidden_layers} layers keep one branch"]
    if saved:
        parts[0] += f" and save {scaled(saved, 'B')}"
    if plan.baseline_loss is not None and plan.predicted_loss is not None:
        rise = fixed(plan.predicted_loss - plan.baseline_loss, 4, sign=True)
        parts.append(f"predicted loss {plan.predicted_loss:.4f} ({rise} against {plan.baseline_loss:.4f})")
    if plan.budget.max_loss_increase is not None:
        parts.append(f"allowed rise {plan.budget.max_loss_increase:g}")
    return "; ".join(parts) + ". The columns “without” show the measured change of the loss, in nats per token."


def _tree(plan: PrunePlan) -> str:
    """The pruned network as a strip: one cell per layer, a half for each branch, hollow where it is removed."""
    keeps = {entry.layer: entry.keep for entry in plan.layers}
    cells = ""
    for layer in range(plan.model.num_hidden_layers):
        keep = keeps.get(layer, "both")
        halves = "".join(f'<i class="{branch}{"" if keep in ("both", branch) else " off"}"></i>' for branch in BRANCHES)
        cells += f'<span class="layer" title="layer {layer}: {NAMES[keep]}">{halves}<em>{layer}</em></span>'
    keys = (("mamba", "Mamba"), ("attention", "attention"), ("off", "removed"))
    legend = " ".join(f'<i class="{css}"></i> {label}' for css, label in keys)
    return f'<div class="tree" aria-hidden="true">{cells}</div>{tag("p", legend, "key")}'


def _plan_row(entry: LayerPlan) -> list[str]:
    increases = []
    for branch in BRANCHES:
        rise = entry.loss_increase.get(branch, math.nan)
        taken = entry.keep not in ("both", branch)
        text = fixed(rise, 4, sign=True)
        increases.append(f"<b>{text}</b> <small>taken</small>" if taken else text)
    saves = scaled(entry.bytes_saved, "B") if entry.bytes_saved else ABSENT
    if entry.flops_saved_per_token:
        saves += f"<br><small>{scaled(entry.flops_saved_per_token)} FLOPs/token</small>"
    pill = f'<span class="pill {entry.keep}">{NAMES[entry.keep]}</span>'
    return [str(entry.layer), pill, _gauge(entry.gate_mean), *increases, saves, esc(entry.why)]


def _gauge(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f'<span class="gauge"><i style="left:{100 * value:.1f}%"></i></span>{value:.2f}'


def generated(run: RunFolder) -> str:
    """Each prompt with what every model wrote after it."""
    if not run.samples:
        return section("What it writes", "", absent("No <code>samples.json</code> here: no text was generated."))
    body = ""
    for sample in run.samples:
        texts = sample.get("completions")
        cards = ""
        for name, text in texts.items() if isinstance(texts, dict) else ():
            code = tag("span", esc(sample.get("prompt", "")), "prompt") + esc(text)
            cards += tag("div", tag("h3", esc(name)) + f'<pre tabindex="0">{code}</pre>')
        body += tag("div", cards, "samples")
    return section("What it writes", "The prompt is pale; what follows was generated.", body)


def setup(run: RunFolder, parameters: int | None) -> str:
    """The model card's facts and the configuration as written."""
    facts = [("Parameters", f"{parameters:,}")] if parameters is not None else []
    facts += [(label, esc(run.model[key])) for key, label in MODEL_FACTS.items() if run.model.get(key) is not None]
    cells = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts)
    body = tag("dl", cells, "facts") if facts else absent("No model description: neither a checkpoint nor config.yaml.")
    if run.config_text:
        code = f'<pre tabindex="0">{esc(run.config_text)}</pre>'
        body += f"<details><summary>Full configuration</summary>{code}</details>"
    return section("Model", "", body)


def notes(run: RunFolder) -> str:
    """What was damaged or could not be shown."""
    if not run.notes:
        return ""
    return section("Left out", "", tag("ul", "".join(tag("li", esc(note)) for note in run.notes), "notes"))
