"use strict";
// Puts the report together: charts into their sections, the completions, and reloading while a run goes on.

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const section of data.sections) {
    const place = document.querySelector(`[data-section="${section.id}"]`);
    const fill = () => { if (!place.childElementCount) place.append(...section.charts.map((chart) => drawChart(chart, data.end))); };
    const closed = place.closest("details");
    if (closed) closed.addEventListener("toggle", fill);
    else fill();
  }
  browse(data);
  reloading();
}

function reloading() {
  const box = document.getElementById("reload");
  if (!box) return;
  box.checked = location.hash === "#reload";
  let timer = 0;
  const arm = () => {
    clearTimeout(timer);
    if (box.checked) timer = setTimeout(() => location.reload(), 30000);
    history.replaceState(null, "", box.checked ? "#reload" : "#");
  };
  box.addEventListener("change", arm);
  if (box.checked) arm();
}

start();
