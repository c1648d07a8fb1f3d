"use strict";
// Looks numbers up and draws them; every number was computed by the library.
const D = JSON.parse(document.getElementById("values").textContent);
const chosen = { ...D.first };
let t = null;

const el = (id) => document.getElementById(id);
const look = (name, other) => {
  const table = D.tables[name];
  if (!table) return null;
  const state = { ...chosen, ...other };
  return table.at[table.of.map((choice) => state[choice]).join(",")];
};
const terms = () => look("terms");
const last = () => terms().length - 1; // T
const num = (v, digits = 2) => v.toFixed(digits).replace("-", "−");
const bits = (v) => num(v, Math.abs(v) < 1 ? 3 : Math.abs(v) < 100 ? 2 : 0);
const unit = (v) => `${bits(v)}\u00a0bits`;
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));

// ---- drawing

function sheet(id, height, label) {
  const box = el(id);
  const width = Math.max(240, box.clientWidth);
  const svg = add(null, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  svg.style.height = `${height}px`;
  box.replaceChildren(svg);
  return { svg, width, height };
}

function add(parent, tag, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

const scale = (low, high, from, to) => (v) => from + ((v - low) / (high - low)) * (to - from);
const line = (points) => "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) found.push(v);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return found.map((v) => [v, num(Math.abs(v) < step / 2 ? 0 : v, digits)]);
}

function axis(s, X, y, low, high, count = 6) {
  add(s.svg, "path", { class: "axis", d: `M${X(low)} ${y}H${X(high)}` });
  for (const [v, name] of ticks(low, high, Math.min(count, s.width / 60))) {
    add(s.svg, "path", { class: "axis", d: `M${X(v)} ${y}v4` });
    add(s.svg, "text", { x: X(v), y: y + 18, "text-anchor": "middle" }, name);
  }
}

const asCurve = (c) => (typeof c[0] === "number" ? ["normal", ...c] : c);

function points(c) {
  const [kind, a, b, ys] = asCurve(c);
  if (kind === "normal") return D.bell[0].map((u, i) => [a + b * u, D.bell[1][i] / b]);
  if (kind === "bars") return a.map((y, i) => [i, y]);
  return ys.map((y, i) => [a + b * i, y]);
}

const span = (c) => {
  const seen = points(c);
  const most = Math.max(...seen.map((p) => p[1]));
  const inside = seen.filter((p) => p[1] > most / 1000).map((p) => p[0]);
  return [Math.min(...inside), Math.max(...inside)];
};

// Draws distributions over one axis: {curve, colour, name}, and marks: {at, colour, name}.
function densities(id, label, curves, marks, range) {
  const s = sheet(id, 210, label);
  const bars = curves.some((c) => asCurve(c.curve)[0] === "bars");
  let [low, high] = range || [Infinity, -Infinity];
  if (!range) {
    for (const c of curves) {
      const [a, b] = span(c.curve);
      [low, high] = [Math.min(low, a), Math.max(high, b)];
    }
    for (const m of marks) [low, high] = [Math.min(low, m.at), Math.max(high, m.at)];
    const margin = bars ? 0.7 : 0.04 * (high - low);
    [low, high] = [low - margin, high + margin];
  }
  const X = scale(low, high, 10, s.width - 10);
  const base = s.height - 26;
  const top = Math.max(...curves.map((c) => Math.max(...points(c.curve).map((p) => p[1]))));
  const Y = scale(0, top, base, 46);
  curves.forEach((c, i) => {
    const seen = points(c.curve).filter((p) => p[0] >= low - 1e-9 && p[0] <= high + 1e-9);
    if (asCurve(c.curve)[0] === "bars") {
      const wide = Math.max(1.5, (X(1) - X(0)) / curves.length - 1.5);
      for (const [x, y] of seen) {
        const left = X(x) + (i - curves.length / 2) * (wide + 0.75);
        add(s.svg, "rect", { x: left, y: Y(y), width: wide, height: base - Y(y), fill: `var(--${c.colour})` });
      }
    } else {
      const path = seen.map(([x, y]) => [X(x), Y(y)]);
      const area = line(path) + `L${path[path.length - 1][0]} ${base}L${path[0][0]} ${base}Z`;
      add(s.svg, "path", { d: area, fill: `var(--${c.colour}-tint)` });
      const dash = c.colour === "p" ? "7 3" : "none";
      add(s.svg, "path", { d: line(path), fill: "none", stroke: `var(--${c.colour})`, "stroke-width": 2.2, "stroke-dasharray": dash });
    }
  });
  axis(s, X, base, low, high);
  const taken = [];
  for (const m of marks) {
    const x = X(clamp(m.at, low, high));
    let row = 0;
    const half = 6 + 3.8 * m.plain.length;
    while (taken.some((k) => k.row === row && Math.abs(k.x - x) < k.half + half)) row += 1;
    taken.push({ x, row, half });
    const y = 38 - 15 * row;
    add(s.svg, "path", { d: `M${x} ${base}V${y + 4}`, stroke: `var(--${m.colour})`, "stroke-width": 1.6 });
    add(s.svg, "circle", { cx: x, cy: base, r: 3.6, fill: `var(--${m.colour})` });
    const name = add(s.svg, "text", { x: clamp(x, half, s.width - half), y, "text-anchor": "middle" });
    name.style.fill = `var(--${m.colour})`;
    name.style.fontWeight = 600;
    indexed(name, m.plain);
  }
}

// Text such as z_t or m_t with its index below.
function indexed(node, text) {
  const [head, tail] = text.split("_");
  node.textContent = head;
  if (tail) add(node, "tspan", { dy: 3, "font-size": "10px" }, tail);
}

// ---- panels; k is the place of the term in the sum: 0 the prior, T the reconstruction

const say = (id, html) => {
  if (el(`say-${id}`)) el(`say-${id}`).innerHTML = html;
};
const z = (i) => `<i>z</i><sub>${i}</sub>`;

function drawPath(T) {
  const s = sheet("path", 280, `the latents z 1 to z ${T} of one draw, from the data to the noise`);
  const q = look("marginal"), path = look("z"), x = D.x[chosen.x];
  const X = scale(0, T, 36, s.width - 92), Y = scale(-3.6, 3.6, 240, 14);
  const mean = [x, ...q.map((v) => v[0])], sd = [0, ...q.map((v) => v[1])];
  for (const width of [2, 1]) {
    const up = mean.map((m, i) => [X(i), Y(m + width * sd[i])]);
    const down = mean.map((m, i) => [X(i), Y(m - width * sd[i])]).reverse();
    add(s.svg, "path", { d: line([...up, ...down]) + "Z", fill: "var(--q-tint)" });
  }
  add(s.svg, "path", { d: line(mean.map((m, i) => [X(i), Y(m)])), fill: "none", stroke: "var(--q)", "stroke-width": 1, "stroke-dasharray": "2 4" });
  const bell = D.bell[0].map((u, i) => [X(T) + 14 + 150 * D.bell[1][i], Y(u)]).filter((p) => p[1] > 8 && p[1] < 246);
  add(s.svg, "path", { d: line(bell) + `L${X(T) + 14} ${bell[bell.length - 1][1]}L${X(T) + 14} ${bell[0][1]}Z`, fill: "var(--p-tint)", stroke: "var(--p)", "stroke-width": 1.4, "stroke-dasharray": "6 3" });
  for (const v of D.x) add(s.svg, "circle", { cx: X(0) - 14, cy: Y(v), r: 3.2, fill: "var(--x)", opacity: v === x ? 1 : 0.45 });
  const all = [x, ...path];
  add(s.svg, "path", { d: line(all.map((v, i) => [X(i), Y(v)])), fill: "none", stroke: "var(--muted)", "stroke-width": 1.2 });
  all.forEach((v, i) => {
    const now = i === Math.min(t, T);
    add(s.svg, "circle", { cx: X(i), cy: Y(v), r: now ? 6 : 3.4, fill: i ? (now ? "var(--ink)" : "var(--muted)") : "var(--x)" });
  });
  if (t <= T) {
    const from = [X(t), Y(path[t - 1])];
    const ends = t > 1 ? [["q", look("back")[t - 2][0]]] : [];
    for (const [colour, v] of [...ends, ["p", look("f")[t - 1][0]]]) {
      add(s.svg, "path", { d: line([from, [X(t - 1), Y(v)]]), stroke: `var(--${colour})`, "stroke-width": 2.2, "stroke-dasharray": colour === "p" ? "7 3" : "none" });
      add(s.svg, "circle", { cx: X(t - 1), cy: Y(v), r: 4.6, fill: `var(--${colour})`, stroke: "var(--paper)", "stroke-width": 1.5 });
    }
  }
  const every = Math.ceil((T * 34) / (s.width - 130));
  for (let i = 0; i <= T; i += 1) {
    if (i % every && i !== t) continue;
    const name = add(s.svg, "text", { x: X(i), y: 262, "text-anchor": "middle", class: i === Math.min(t, T) ? "strong" : "" });
    indexed(name, i ? `z_${i}` : "x");
  }
  const [down, f] = [`<span class="q"><i>m</i><sub>t</sub></span>`, `<span class="p"><i>f</i></span>`];
  say("path", t > T
    ? `All noise is added: ${z(T)} should look like a draw from <span class="p">N(0, 1)</span>, where the model starts.`
    : t > 1
      ? `From ${z(t)} = ${num(path[t - 1])} back to ${z(t - 1)}: given <span class="x"><i>x</i></span>, the mean is ${down} = ${num(look("back")[t - 2][0])}; the model predicts ${f} = ${num(look("f")[t - 1][0])}.`
      : `The last step: from ${z(1)} = ${num(path[0])} the model predicts ${f} = ${num(look("f")[0][0])}, and <span class="x"><i>x</i></span> is ${num(x)}.`);
}

function drawMarginal(T) {
  const i = Math.min(t, T), q = look("marginal")[i - 1], value = look("z")[i - 1];
  const marks = [{ at: value, colour: "ink", plain: `z_${i}` }];
  const x = D.x ? D.x[chosen.x] : look("e");
  if (x !== null) marks.push({ at: x, colour: "x", plain: "x" });
  densities("marginal", `the density of z ${i} given x`, [{ curve: q, colour: "q" }], marks);
  if (asCurve(q)[0] === "normal") {
    const [, mean, sd] = asCurve(q);
    say("marginal", `Given <span class="x"><i>x</i></span>, ${z(i)} has <span class="q">mean ${num(mean)} and standard deviation ${num(sd)}</span>; the draw shown is ${num(value)}.`);
  } else say("marginal", `Given <span class="x"><i>x</i></span>, ${z(i)} <span class="q">shows it or hides it</span>; the last bar means hidden.`);
}

function drawBack(T) {
  if (t > T) {
    const q = look("marginal")[T - 1], p = look("prior") || ["normal", 0, 1];
    densities("back", "the end of the encoder and the start of the model", [{ curve: q, colour: "q" }, { curve: p, colour: "p" }], []);
    say("back", `Before the first step: <span class="q"><i>q</i>(${z(T)}|<i>x</i>)</span> still depends a little on <i>x</i>; the model starts from <span class="p"><i>P</i>(${z(T)})</span>, which does not.`);
  } else if (t > 1) {
    const q = look("back")[t - 2], p = look("f")[t - 1];
    const normal = [q, p].every((c) => asCurve(c)[0] === "normal");
    const means = normal ? [{ at: asCurve(q)[1], colour: "q", plain: "m_t" }, { at: asCurve(p)[1], colour: "p", plain: "f" }] : [];
    densities("back", `the two distributions of z ${t - 1} given z ${t}`, [{ curve: q, colour: "q" }, { curve: p, colour: "p" }], means);
    say("back", normal
      ? `The encoder, which knows <i>x</i>: <span class="q"><i>m</i><sub>t</sub> = ${num(asCurve(q)[1])}, √β̃ = ${num(asCurve(q)[2])}</span>. The model, which does not: <span class="p"><i>f</i> = ${num(asCurve(p)[1])}, <i>σ</i> = ${num(asCurve(p)[2])}</span>.`
      : `Solid blue, the encoder, which knows <i>x</i>; dashed orange, the model, which does not, and is therefore wider.`);
  } else {
    const p = look("f")[0], x = D.x ? D.x[chosen.x] : look("x_code");
    densities("back", "the model's distribution of x, given z 1", [{ curve: p, colour: "p" }], x === null ? [] : [{ at: x, colour: "x", plain: "x" }]);
    say("back", `The last step gives the data: <span class="p"><i>P</i>(<i>x</i>|${z(1)})</span>. It costs −log<sub>2</sub> of the height at <span class="x"><i>x</i></span>.`);
  }
}

function drawCost(T, k) {
  const mean = terms()[k], here = t > T ? mean : look("here")[t - 1];
  const parts = look("constant");
  const fixed = t > 1 && t <= T && parts ? parts[t - 2] : 0;
  const most = Math.max(...terms().map(Math.abs), Math.abs(here), 1e-9);
  const least = Math.min(0, ...terms(), here);
  const s = sheet("cost", 104, "the cost of this step");
  const X = scale(least, most, 10, s.width - 14);
  const bar = (from, to, fill) => add(s.svg, "rect", { x: Math.min(X(from), X(to)), y: 30, width: Math.abs(X(to) - X(from)), height: 30, fill, rx: 2 });
  if (here < 0) bar(here, 0, "var(--kl)");
  else {
    bar(0, Math.min(fixed, here), "var(--done)");
    bar(Math.min(fixed, here), here, "var(--kl)");
  }
  const x = X(mean);
  add(s.svg, "path", { d: `M${x} 22V68`, stroke: "var(--ink)", "stroke-width": 2 });
  add(s.svg, "text", { x: clamp(x, 30, s.width - 30), y: 16, "text-anchor": "middle", class: "strong" }, "mean");
  axis(s, X, 76, least, most, 5);
  if (t > T) say("cost", `The prior term is exact: <span class="kl">KL(<i>q</i>(${z(T)}|<i>x</i>) ‖ <i>P</i>(${z(T)})) = ${unit(mean)}</span>.`);
  else if (t === 1) say("cost", `−log<sub>2</sub> <i>P</i>(<i>x</i>|${z(1)}) is <span class="kl">${unit(here)}</span> at this ${z(1)}, and ${unit(mean)} on average over <i>q</i>(${z(1)}|<i>x</i>).`);
  else if (parts) say("cost", `At this ${z(t)}: ${unit(Math.max(0, here - fixed))} because <i>f</i> differs from <i>m</i><sub>t</sub>, and a constant ${unit(fixed)} because <i>σ</i>² differs from β̃: <span class="kl">${unit(here)}</span>. On average over ${z(t)}: ${unit(mean)}.`);
  else say("cost", `At this ${z(t)}, over all dimensions: <span class="kl">${unit(here)}</span>. On average over ${z(t)}: ${unit(mean)}.`);
}

function drawSchedule(T) {
  const alpha = [1, ...look("alpha")], beta = look("beta");
  const s = sheet("schedule", 190, "alpha and beta over time");
  const X = scale(0, T, 34, s.width - 20), Y = scale(0, 1, 160, 16);
  for (const v of [0, 0.5, 1]) {
    add(s.svg, "path", { class: "axis", d: `M34 ${Y(v)}H${s.width - 10}` });
    add(s.svg, "text", { x: 26, y: Y(v) + 4, "text-anchor": "end" }, String(v));
  }
  const wide = Math.min(22, (X(1) - X(0)) * 0.5), now = Math.min(t, T);
  beta.forEach((v, i) => add(s.svg, "rect", { x: X(i + 1) - wide / 2, y: Y(v), width: wide, height: Y(0) - Y(v), rx: 2, fill: "var(--muted)", opacity: i + 1 === now ? 0.85 : 0.3 }));
  add(s.svg, "path", { d: line(alpha.map((v, i) => [X(i), Y(v)])), fill: "none", stroke: "var(--q)", "stroke-width": 2.2 });
  alpha.forEach((v, i) => add(s.svg, "circle", { cx: X(i), cy: Y(v), r: i === now ? 5.5 : 3, fill: "var(--q)" }));
  const every = Math.ceil((T * 24) / (s.width - 60));
  for (let i = 0; i <= T; i += 1) if (i % every === 0 || i === now) add(s.svg, "text", { x: X(i), y: 180, "text-anchor": "middle", class: i === now ? "strong" : "" }, String(i));
  say("schedule", `<span class="q">α<sub>${now}</sub> = ${num(alpha[now], 3)}</span> of the signal’s power is left (line); this step mixes in β<sub>${now}</sub> = ${num(beta[now - 1], 3)} of noise (bars).`);
}

function drawSum(T, k) {
  const all = terms(), evidence = look("evidence");
  const s = sheet("sum", 270, "the running sum of the terms");
  const ends = [0];
  for (const v of all) ends.push(ends[ends.length - 1] + v);
  const total = look("total");
  let low = Math.min(...ends, evidence === null ? 0 : evidence);
  let high = Math.max(...ends, evidence === null ? 0 : evidence);
  [low, high] = [low - 0.04 * (high - low), high + 0.08 * (high - low)];
  const left = s.width < 480 ? 34 : 52;
  const X = scale(0, all.length, left, s.width - 92), Y = scale(low, high, 226, 16);
  for (const [v, name] of ticks(low, high, 5)) {
    add(s.svg, "path", { class: "axis", d: `M${left} ${Y(v)}H${s.width - 92}` });
    add(s.svg, "text", { x: left - 8, y: Y(v) + 4, "text-anchor": "end" }, name);
  }
  const every = Math.ceil((all.length * 46) / (s.width - 140));
  all.forEach((v, i) => {
    const fill = i > k ? "var(--kl-tint)" : i === k ? "var(--kl)" : "var(--done)";
    const top = Math.min(Y(ends[i]), Y(ends[i + 1]));
    const gap = Math.min(4, (X(1) - X(0)) * 0.15);
    add(s.svg, "rect", { x: X(i) + gap, y: top, width: X(1) - X(0) - 2 * gap, height: Math.max(1.5, Math.abs(Y(ends[i]) - Y(ends[i + 1]))), fill, rx: 1.5 });
    if (i < all.length - 1) add(s.svg, "path", { d: `M${X(i + 1) - gap} ${Y(ends[i + 1])}h${2 * gap}`, stroke: "var(--muted)" });
    const place = all.length - i - 1;
    const end = i === 0 || place === 0, free = Math.abs(i - k) >= every;
    if (i === k || (free && (end || (i % every === 0 && place >= every)))) {
      const name = i === 0 ? "prior" : place === 0 ? "x" : `t=${place + 1}`;
      add(s.svg, "text", { x: X(i + 0.5), y: 246, "text-anchor": "middle", class: i === k ? "strong" : "" }, name);
    }
  });
  const right = s.width - 88;
  const rule = (v, colour, dash) => add(s.svg, "path", { d: `M${left} ${Y(v)}H${right}`, stroke: colour, "stroke-width": 1.6, "stroke-dasharray": dash });
  const note = (v, text, colour, dy) => {
    const node = add(s.svg, "text", { x: right + 4, y: Y(v) + dy }, text);
    node.style.fill = colour;
    node.style.fontWeight = 600;
  };
  rule(total, "var(--ink)", "none");
  const close = evidence !== null && Math.abs(Y(total) - Y(evidence)) < 32;
  note(total, "−ELBO", "var(--ink)", close ? -8 : 0);
  add(s.svg, "text", { x: right + 4, y: Y(total) + (close ? -8 : 0) - 14, class: "strong" }, unit(total));
  if (evidence !== null) {
    const [x, low] = [right - 7, Math.min(Y(total), Y(evidence))];
    add(s.svg, "rect", { x, y: low, width: 7, height: Math.abs(Y(total) - Y(evidence)), fill: "var(--kl)" });
    rule(evidence, "var(--p)", "7 3");
    note(evidence, "−log₂ P(x)", "var(--p)", close ? 14 : 4);
    note(evidence, unit(evidence), "var(--p)", close ? 29 : 19);
  }
  const sofar = ends[k + 1];
  const gap = look("gap"), error = look("error");
  say("sum", `${k === T ? "All terms" : "So far"}: <span class="kl">${unit(sofar)}</span> of −ELBO = ${unit(total)}${error === null ? "" : ` ± ${bits(error)} (Monte Carlo)`}.` +
    (gap === null ? " −log<sub>2</sub> <i>P</i>(<i>x</i>) is lower; how much is unknown for a network with many dimensions." : ` It lies above <span class="p">−log<sub>2</sub> <i>P</i>(<i>x</i>) = ${unit(evidence)}</span> by KL[<i>q</i>‖<i>P</i>(<i>z</i>|<i>x</i>)] = ${unit(gap)}.`));
}

function drawEvidence() {
  const p = look("density"), below = look("below");
  const s = sheet("evidence", 260, "the density of the model and its lower bound");
  const [start, step] = D.curve, end = start + step * (p.length - 1);
  const X = scale(start, end, 10, s.width - 10), top = Math.max(...p), Y = scale(0, top, 226, 22);
  const path = (ys) => line(ys.map((y, i) => [X(start + step * i), Y(y)]));
  const area = path(p) + "L" + [...below].map((y, i) => [X(start + step * i), Y(y)]).reverse().map((v) => `${v[0].toFixed(1)} ${v[1].toFixed(1)}`).join("L") + "Z";
  add(s.svg, "path", { d: area, fill: "var(--kl-tint)" });
  add(s.svg, "path", { d: path(p), fill: "none", stroke: "var(--p)", "stroke-width": 2.4, "stroke-dasharray": "7 3" });
  add(s.svg, "path", { d: path(below), fill: "none", stroke: "var(--kl)", "stroke-width": 2.2 });
  axis(s, X, 226, start, end, 7);
  for (const v of D.x) add(s.svg, "circle", { cx: X(v), cy: 226, r: v === D.x[chosen.x] ? 6 : 4, fill: "var(--x)" });
  const x = X(D.x[chosen.x]);
  add(s.svg, "path", { d: `M${x} 226V22`, stroke: "var(--x)", "stroke-width": 1.4 });
  const labels = [["P(x)", "var(--p)"], ["exp ELBO(x)", "var(--kl)"], ["data", "var(--x)"]];
  let left = 14;
  for (const [name, colour] of labels) {
    const node = add(s.svg, "text", { x: left, y: 12 }, name);
    node.style.fill = colour;
    node.style.fontWeight = 600;
    left += 22 + 8 * name.length;
  }
  const [e, total, gap] = [look("evidence"), look("total"), look("gap")];
  say("evidence", `At <span class="x"><i>x</i> = ${num(D.x[chosen.x], 1)}</span>: <span class="p">log<sub>2</sub> <i>P</i>(<i>x</i>) = ${unit(-e)}</span> = ELBO + KL = ${unit(-total)} + <span class="kl">${unit(gap)}</span>. The shaded gap is never negative; a better <i>f</i>, or more steps, closes it.`);
}

function drawPictures(T, k) {
  const i = Math.min(t, T);
  const set = (id, source) => {
    el(id).src = source || "";
    el(id).style.visibility = source ? "visible" : "hidden";
  };
  set("picture-x", look("image_x"));
  set("picture-z", look("image_z")[i - 1]);
  set("picture-f", t > T ? "" : look("image_f")[i - 1]);
  set("picture-cost", look("image_cost")[k]);
  for (const mark of document.querySelectorAll(".mark")) {
    const [left, top, wide, high] = D.places[chosen.dim];
    Object.assign(mark.style, { left: `${left}%`, top: `${top}%`, width: `${wide}%`, height: `${high}%` });
  }
  say("pictures", t > T ? "Hardly any signal is left; what is left costs the prior term." : `From ${z(i)} the network predicts <i>x̂</i>; where it is wrong, the step costs bits (the brighter, the more; ${unit(look("heat")[k])} in the brightest pixel).`);
}

function drawRows(T, k) {
  const i = Math.min(t, T), rows = el("rows");
  const cells = (list) => (list ? list : D.names.map(() => ""));
  const [x, latent, f, cost] = [look("row_x"), look("row_z")[i - 1], t > T ? null : look("row_f")[i - 1], look("row_cost")[k]];
  rows.replaceChildren();
  D.names.forEach((name, n) => {
    const row = rows.insertRow();
    [name, x[n], latent[n], cells(f)[n], bits(cost[n])].forEach((v) => { row.insertCell().textContent = v; });
    if (n === D.shown[chosen.dim]) row.className = "chosen";
  });
}

// ---- all of it

function draw() {
  const T = last();
  if (t === null) t = Math.max(2, Math.ceil(0.6 * T));
  const k = T + 1 - t, all = terms();
  const slider = el("t");
  slider.max = T + 1;
  slider.value = t;
  el("down").disabled = t <= 1;
  el("up").disabled = t > T;
  const what = t > T ? `start: prior term` : t === 1 ? `t = 1: from z1 to x` : `t = ${t} of ${T}`;
  const sofar = all.slice(0, k + 1).reduce((a, b) => a + b, 0);
  slider.setAttribute("aria-valuetext", what);
  el("where").innerHTML = `<b>${what}</b> · costs <b>${unit(all[k])}</b> · so far ${unit(sofar)} of −ELBO = ${unit(look("total"))}`;
  const panels = { path: drawPath, marginal: drawMarginal, back: drawBack, cost: drawCost, schedule: drawSchedule, sum: drawSum, evidence: drawEvidence, pictures: drawPictures, rows: drawRows };
  for (const [id, paint] of Object.entries(panels)) if (el(id)) paint(T, k);
  for (const choice of D.choices) {
    if (choice.priced) choice.options.forEach((_, i) => { el(`price-${choice.name}-${i}`).textContent = unit(look("total", { [choice.name]: i })); });
  }
}

function move(to) {
  t = clamp(to, 1, last() + 1);
  draw();
}

document.querySelector(".choices").addEventListener("change", (event) => {
  const before = last();
  chosen[event.target.name] = Number(event.target.value);
  if (last() !== before) t = clamp(Math.round(((t - 1) / before) * last()) + 1, 1, last() + 1);
  draw();
});
document.querySelector(".choices").addEventListener("submit", (event) => event.preventDefault());
el("t").addEventListener("input", (event) => move(Number(event.target.value)));
el("down").addEventListener("click", () => move(t - 1));
el("up").addEventListener("click", () => move(t + 1));
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.tagName === "INPUT") return;
  const to = { ArrowLeft: t - 1, ArrowRight: t + 1, Home: 1, End: last() + 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  move(to);
});
let width = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth !== width) {
    width = document.body.clientWidth;
    draw();
  }
}).observe(document.body);
