"use strict";
// Keeps a watched page current: asks for it again every two seconds and, where it has changed, puts the new contents in
// the place of the old. What the reader has set stays: scrolling, filters, hidden lines, what is folded, the focus.

const EVERY = 2000;
let tag = document.body.dataset.tag;

async function refresh() {
  try {
    const answer = await fetch(location.href, { headers: { "If-None-Match": tag }, cache: "no-store" });
    if (answer.status === 200) {
      tag = answer.headers.get("ETag");
      put(new DOMParser().parseFromString(await answer.text(), "text/html"));
    }
    document.body.classList.toggle("lost", !answer.ok && answer.status !== 304);
  } catch {
    document.body.classList.add("lost");  // the server has ended, or the machine sleeps
  }
  setTimeout(refresh, EVERY);
}

function put(page) {
  const kept = settings();
  for (const id of ["main", "state", "data"]) {
    const now = document.getElementById(id), then = page.getElementById(id);
    if (now && then) now.replaceWith(document.adoptNode(then));
  }
  document.title = page.title;
  if (typeof start === "function") start();
  restore(kept);
}

// What the reader has set

function settings() {
  const form = document.getElementById("filter"), focus = document.activeElement;
  return {
    scroll: [scrollX, scrollY],
    open: [...document.querySelectorAll("details[open]")].map((node) => node.closest("section").id),
    fields: form ? [...new FormData(form)] : [],
    hidden: [...document.querySelectorAll('.legend [aria-pressed="false"]')].map(named),
    checked: [...document.querySelectorAll("main table input:checked")].map((box) => box.value),
    focus: focus && focus.name ? { name: focus.name, at: focus.selectionStart } : null,
  };
}

function named(button) {
  return `${button.closest("figure").querySelector("h3").textContent}/${button.textContent}`;
}

function restore(kept) {
  for (const id of kept.open) {
    const details = document.querySelector(`#${CSS.escape(id)} details`);
    if (details) details.open = true;
  }
  const form = document.getElementById("filter");
  if (form) {
    for (const [name, value] of kept.fields) if (form.elements[name]) form.elements[name].value = value;
    form.dispatchEvent(new Event("input"));
  }
  for (const box of document.querySelectorAll("main table input")) box.checked = kept.checked.includes(box.value);
  // Charts that a fold has just opened are drawn a moment later.
  requestAnimationFrame(() => {
    for (const button of document.querySelectorAll(".legend button")) if (kept.hidden.includes(named(button))) button.click();
    scrollTo(...kept.scroll);
  });
  if (kept.focus) {
    const field = document.querySelector(`[name="${kept.focus.name}"]`);
    if (field) field.focus({ preventScroll: true });
    if (field && kept.focus.at !== null && field.setSelectionRange) field.setSelectionRange(kept.focus.at, kept.focus.at);
  }
}

setTimeout(refresh, EVERY);
