"use strict";
// The browser of sampled completions: four views of the same groups, filtered by run, step, origin and text.
// Everything that a model wrote becomes a text node.

const PAGE = 10;

function browse(data) {
  const form = document.getElementById("filter");
  if (!form) return;
  const state = { data, form, limit: PAGE };
  const shown = (one) => { one.pictures = (one.images || []).map((name) => data.images[name]); };
  for (const group of data.groups) {
    shown(group);
    for (const sample of group.samples) (sample.turns || []).forEach(shown);
  }
  options(form.elements.step, "every step", [...new Set(data.groups.map((g) => g.step))].sort((a, b) => a - b));
  options(form.elements.kind, "training and held out", [...new Set(data.groups.map((g) => g.kind))]);
  if (form.elements.run) options(form.elements.run, "every run", [...new Set(data.groups.map((g) => g.run))]);
  const view = data.improved.length ? "improved" : "best";
  form.querySelector(`input[value="${view}"]`).checked = true;
  const update = () => { state.limit = PAGE; list(state); };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("show-more").addEventListener("click", () => { state.limit += PAGE; list(state); });
  update();
}

function options(select, every, values) {
  select.append(element("option", { value: "" }, every));
  for (const value of values) select.append(element("option", { value }, String(value)));
}

// What is shown

function wanted(state) {
  const fields = state.form.elements, value = (name) => (fields[name] ? fields[name].value : "");
  return { view: value("view"), run: value("run"), step: value("step"), kind: value("kind"), text: value("text").trim().toLowerCase() };
}

function fits(group, filter) {
  return (!filter.run || group.run === filter.run) && (!filter.step || String(group.step) === filter.step) &&
    (!filter.kind || group.kind === filter.kind);
}

function holds(text, filter) {
  return !filter.text || (text !== null && text !== undefined && text.toLowerCase().includes(filter.text));
}

function askedHolds(group, filter) {
  return group.prompt.some((turn) => holds(turn.text, filter) || (turn.tail && holds(turn.tail, filter))) ||
    (group.answer !== null && holds(group.answer.text, filter));
}

function saidHolds(sample, filter) {
  const texts = [sample, ...(sample.turns || []).flatMap((turn) => [turn, ...turn.calls])];
  return texts.some((cut) => holds(cut.text, filter) || (cut.tail !== undefined && holds(cut.tail, filter)));
}

function list(state) {
  const filter = wanted(state), cards = document.getElementById("cards");
  const found = { improved, best: (s, f) => ranked(s, f, 1), worst: (s, f) => ranked(s, f, -1), groups }[filter.view](state, filter);
  cards.replaceChildren(...found.slice(0, state.limit).map((make) => make()));
  document.getElementById("show-more").hidden = found.length <= state.limit;
  document.getElementById("count").textContent = counted(found.length, filter, state);
}

function counted(count, filter, state) {
  if (filter.view === "improved" && !state.data.improved.length) {
    return "No prompt was sampled at two different steps, so nothing can be compared. [eval] every = N asks the same held-out questions again and again.";
  }
  const one = count === 1, prompts = one ? "prompt" : "prompts";
  const what = {
    improved: `${prompts} seen at two steps or more, by how much the mean reward rose`,
    best: `${prompts} by the best completion`,
    worst: `${prompts} by the worst completion`,
    groups: one ? "group" : "groups",
  }[filter.view];
  const talks = state.data.groups.some((group) => group.samples.some((sample) => sample.turns));
  return count ? `${count} ${what}${talks ? "; what the model said is shaded" : ""}` : "Nothing fits the filter.";
}

// A view is a list of functions that make a card each

function ranked(state, filter, sign) {
  const picked = [];
  for (const group of state.data.groups) {
    if (!fits(group, filter)) continue;
    const scored = group.samples.filter((sample) => sample.reward !== null && (saidHolds(sample, filter) || askedHolds(group, filter)));
    if (scored.length) picked.push({ group, sample: sign > 0 ? scored[0] : scored[scored.length - 1] });
  }
  picked.sort((a, b) => sign * (b.sample.reward - a.sample.reward) || b.group.step - a.group.step);
  return picked.map(({ group, sample }) => () => card(group, [sample], filter));
}

function groups(state, filter) {
  const picked = state.data.groups.filter((group) => fits(group, filter) &&
    (askedHolds(group, filter) || group.samples.some((sample) => saidHolds(sample, filter))));
  picked.sort((a, b) => b.step - a.step);
  return picked.map((group) => () => card(group, group.samples, filter));
}

function improved(state, filter) {
  const picked = state.data.improved.filter(({ first, last }) => {
    const before = state.data.groups[first], after = state.data.groups[last];
    const step = !filter.step || [before, after].some((group) => String(group.step) === filter.step);
    return step && fits(after, { ...filter, step: "" }) &&
      (askedHolds(after, filter) || [before, after].some((group) => saidHolds(typical(group), filter)));
  });
  return picked.map(({ first, last, change }) => () => pair(state.data.groups[first], state.data.groups[last], change, filter));
}

// The completion in the middle of its group, by reward.
function typical(group) {
  return group.samples[Math.floor(group.samples.length / 2)];
}

// Cards

function card(group, samples, filter) {
  const made = element("article", { class: "card" }, heading(group));
  made.append(...question(group, filter), element("div", { class: "samples" }, ...samples.map((sample) => said(sample, filter))));
  return made;
}

function pair(before, after, change, filter) {
  const direction = change > 0 ? "up" : change < 0 ? "down" : "";
  const title = element("h3", {}, `${place(after)}mean reward `, element("b", {}, `${score(before.mean)} → ${score(after.mean)} `),
    element("b", { class: direction }, `(${change > 0 ? "+" : ""}${score(change)})`));
  const sides = [before, after].map((group) => {
    const made = said(typical(group), filter);
    made.prepend(element("h3", {}, `step ${group.step}`));
    return made;
  });
  return element("article", { class: "card" }, title, ...question(after, filter), element("div", { class: "samples pair" }, ...sides));
}

function place(group) {
  return [group.run, group.kind, group.task].filter(Boolean).join(" · ") + " · ";
}

function heading(group) {
  const title = element("h3", {}, place(group), element("b", {}, `step ${group.step}`));
  if (group.count > 1) title.append(` · mean reward of ${group.count}: ${score(group.mean)}`);
  return title;
}

function question(group, filter) {
  const turns = group.prompt, last = turns[turns.length - 1];
  const parts = [];
  if (turns.length > 1) {
    const before = element("details", {}, element("summary", {}, `${turns.length - 1} earlier message${turns.length > 2 ? "s" : ""}`));
    for (const turn of turns.slice(0, -1)) before.append(element("div", { class: "turn" }, element("i", {}, turn.role), ...written(turn, filter)));
    parts.push(before);
  }
  if (group.pictures.length) parts.push(pictures(group.pictures, "the prompt"));
  if (last) parts.push(element("p", { class: "question" }, ...written(last, filter)));
  if (group.answer !== null) parts.push(element("p", { class: "gold" }, element("i", {}, "answer "), ...written(group.answer, filter)));
  return parts;
}

function pictures(sources, where) {
  return element("div", { class: "pictures" }, ...sources.map((source, index) => {
    const name = sources.length > 1 ? `image ${index + 1} of ${sources.length}` : `image of ${where}`;
    return source ? element("img", { src: source, alt: name }) : element("span", { class: "omitted" }, `(${name}, not kept here)`);
  }));
}

function said(sample, filter) {
  const text = sample.turns ? element("div", { class: "episode", tabindex: 0 }, ...sample.turns.map((turn) => spoken(turn, filter)))
    : element("pre", { class: "completion", tabindex: 0 }, ...written(sample, filter));
  if (!sample.turns && !sample.text) text.append(element("span", { class: "omitted" }, "(nothing)"));
  const scores = element("ul", { class: "scores" }, entry("reward", sample.reward, "total"));
  for (const [name, value] of Object.entries(sample.rewards)) scores.append(entry(name, value, ""));
  const facts = [];
  if (sample.extracted !== null) facts.push(`read as ${sample.extracted}`);
  if (sample.tokens !== null) facts.push(`${sample.tokens} tokens${sample.truncated ? ", cut" : ""}`);
  return element("div", { class: "sample" }, text, element("div", {}, scores, element("div", { class: "said" }, element("i", {}, facts.join(" · ")))));
}

// One turn of an episode: what was sampled stands out from what the environment said.
function spoken(turn, filter) {
  if (turn.left_out) return element("div", { class: "turn omitted" }, `… ${plainNumber(turn.left_out, 0)} turns left out …`);
  const role = turn.reward === null ? turn.role : `${turn.role} · reward ${score(turn.reward)}`;
  const made = element("div", { class: turn.sampled ? "turn sampled" : "turn" }, element("i", {}, role), ...written(turn, filter));
  if (turn.pictures.length) made.append(pictures(turn.pictures, "this turn"));
  for (const call of turn.calls) made.append(element("code", { class: "call" }, ...written(call, filter)));
  if (!turn.text && !turn.calls.length) made.append(element("span", { class: "omitted" }, "(nothing)"));
  return made;
}

function entry(name, value, kind) {
  return element("li", { class: kind }, element("span", {}, name), element("b", {}, score(value)));
}

function score(value) {
  return value === null ? "none" : plainNumber(value, 3);
}

// Text with its cut marked and what was searched for highlighted.
function written(cut, filter) {
  const parts = highlighted(cut.text, filter);
  if (cut.omitted) {
    parts.push(element("span", { class: "omitted" }, `\n… ${plainNumber(cut.omitted, 0)} characters left out …\n`), ...highlighted(cut.tail, filter));
  }
  return parts;
}

function highlighted(text, filter) {
  if (!filter.text) return [text];
  const parts = [], lower = text.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(filter.text); at >= 0; at = lower.indexOf(filter.text, from)) {
    parts.push(text.slice(from, at), element("mark", {}, text.slice(at, at + filter.text.length)));
    from = at + filter.text.length;
  }
  return [...parts, text.slice(from)];
}
