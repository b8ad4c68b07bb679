"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const names = { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" };
  const next = { auto: "light", light: "dark", dark: "auto" };
  let theme = "auto";
  try { theme = localStorage.getItem("mithridate-theme") ?? "auto"; } catch { /* no storage for files */ }
  const apply = () => {
    if (theme === "auto") root.removeAttribute("data-theme"); else root.dataset.theme = theme;
    button.textContent = names[theme];
  };
  if (!(theme in names)) theme = "auto";
  apply();
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = next[theme];
    try { localStorage.setItem("mithridate-theme", theme); } catch { /* as above */ }
    apply();
  });

  const charts = JSON.parse(document.getElementById("charts").textContent);
  const tip = document.getElementById("tip");
  const format = (value) => Math.abs(value) >= 1e-3 || value === 0 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
  const line = (text, tag, role) => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (role) element.className = role;
    return element;
  };
  for (const svg of document.querySelectorAll("svg.chart[data-chart]")) {
    const chart = charts[svg.dataset.chart];
    const [left, top, right, bottom] = chart.plot;
    const xs = [...new Set(chart.series.flatMap((series) => series.points.map((point) => point[0])))].sort((a, b) => a - b);
    if (!xs.length) continue;
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", top);
    cursor.setAttribute("y2", bottom);
    let at = -1;
    const show = (index) => {
      at = index;
      const x = left + (xs[index] - chart.x[0]) / (chart.x[1] - chart.x[0] || 1) * (right - left);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      svg.append(cursor);
      tip.replaceChildren(line(`${chart.x_label} ${format(xs[index])}`, "b"));
      for (const series of chart.series) {
        const point = series.points.find((candidate) => candidate[0] === xs[index]);
        if (point) tip.append(line(`${series.label} ${format(point[1])}`, "span", series.role));
      }
      tip.hidden = false;
      const box = svg.getBoundingClientRect();
      const spot = box.left + x / svg.viewBox.baseVal.width * box.width;
      const width = tip.offsetWidth;
      tip.style.left = `${Math.max(8, spot + 14 + width < innerWidth ? spot + 14 : spot - width - 14)}px`;
      tip.style.top = `${Math.max(8, box.top + 18)}px`;
    };
    const hide = () => { tip.hidden = true; cursor.remove(); at = -1; };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      const value = chart.x[0] + (x - left) / (right - left) * (chart.x[1] - chart.x[0]);
      let best = 0;
      xs.forEach((candidate, index) => { if (Math.abs(candidate - value) < Math.abs(xs[best] - value)) best = index; });
      show(best);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
        event.preventDefault();
        show(Math.min(xs.length - 1, Math.max(0, at + (event.key === "ArrowRight" ? 1 : -1))));
      } else if (event.key === "Escape") hide();
    });
  }
})();
