"use strict";
// The page of a run: tabs, figures that are loaded when they are looked at, links, files to save.

const NARROW = 620; // pixels; below it, the panels of a figure stand one under the other
const PANEL_HEIGHT = 300; // pixels, of such a panel
const LEGEND_ROOM = 34; // pixels; a legend that needs more makes its figure higher
const waiting = new Map();
const loading = new Map();

function byId(id) {
  return document.getElementById(id);
}

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

let clearing = 0;
function say(text) {
  byId("status").textContent = text;
  clearTimeout(clearing);
  clearing = setTimeout(() => { byId("status").textContent = ""; }, 4000);
}

// ------------------------------------------------------------------------------ light and dark

const root = document.documentElement;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
root.classList.toggle("dark", prefersDark.matches);

function themeName() {
  return root.classList.contains("dark") ? "dark" : "light";
}

function setTheme(isDark) {
  root.classList.toggle("dark", isDark);
  byId("theme").textContent = isDark ? "light" : "dark";
  for (const plot of document.querySelectorAll(".plot.drawn")) {
    Plotly.relayout(plot, {template: THEMES[themeName()]});
  }
}

// ------------------------------------------------------------------------------ files of figures

// Called by the files of figures.
function showFigure(name, content) {
  waiting.get(name)(content);
}

function loadFigure(name) {
  if (!loading.has(name)) {
    loading.set(name, new Promise((resolve, reject) => {
      waiting.set(name, resolve);
      const script = element("script", {src: `${encodeURIComponent(name)}.js`});
      script.onerror = () => {
        script.remove();
        reject(new Error(`${name}.js is missing beside this page`));
      };
      document.head.append(script);
    }).then(decode));
  }
  return loading.get(name);
}

const ARRAYS = {
  f4: Float32Array, f8: Float64Array, i1: Int8Array, u1: Uint8Array, i2: Int16Array,
  u2: Uint16Array, i4: Int32Array, u4: Uint32Array,
};

// Plotly's numbers in base64 become arrays.
function decode(value) {
  if (Array.isArray(value)) return value.map(decode);
  if (value === null || typeof value !== "object") return value;
  if (!("bdata" in value)) {
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, decode(inner)]));
  }
  const bytes = Uint8Array.from(atob(value.bdata), (letter) => letter.charCodeAt(0));
  const numbers = Array.from(new ARRAYS[value.dtype](bytes.buffer));
  const shape = value.shape ? String(value.shape).split(",").map(Number) : [numbers.length];
  return fold(numbers.map((number) => (Number.isNaN(number) ? null : number)), shape);
}

function fold(numbers, shape) {
  if (shape.length < 2) return numbers;
  const size = numbers.length / shape[0];
  return Array.from({length: shape[0]}, (_, row) => (
    fold(numbers.slice(row * size, (row + 1) * size), shape.slice(1))
  ));
}

// --------------------------------------------------------------------------- drawing of a figure

const states = new Map(); // by the figure's name: what it was made of, and its controls

function plotOf(figure) {
  return figure.querySelector(".plot");
}

async function drawFigure(figure) {
  const name = figure.dataset.name;
  if (!states.has(name)) states.set(name, {});
  const state = states.get(name);
  state.ready ??= draw(figure, state).catch((error) => {
    say(error.message);
    delete state.ready; // so that the next look or click tries again
    loading.delete(name);
  });
  return state.ready;
}

function isDrawn(figure) {
  return plotOf(figure).classList.contains("drawn");
}

async function draw(figure, state) {
  const {data, layout} = await loadFigure(figure.dataset.name);
  state.layout = layout;
  state.title = layout.title?.text ?? figure.dataset.name;
  const plot = plotOf(figure);
  const shown = structuredClone(layout);
  for (const part of ["title", "updatemenus", "sliders", "width"]) delete shown[part];
  shown.template = THEMES[themeName()];
  shown.width = plot.clientWidth; // Plotly's own fitting to the page would forget the height
  const config = {displaylogo: false, modeBarButtonsToRemove: ["toImage"]};
  await Plotly.newPlot(plot, structuredClone(data), shown, config);
  await arrange(figure, state);
  plot.classList.add("drawn");
  addControls(figure, state);
}

// Return the panels of a figure, from top left to bottom right: its axes, and its title's place.
function panelsOf(data, layout) {
  const panels = new Map();
  for (const trace of data) {
    const x = `xaxis${(trace.xaxis ?? "x").slice(1)}`;
    const y = `yaxis${(trace.yaxis ?? "y").slice(1)}`;
    panels.set(x + y, {x, y, title: -1});
  }
  const edge = (axis, end) => (layout[axis]?.domain ?? [0, 1])[end];
  const sorted = [...panels.values()].sort((a, b) => (
    edge(b.y, 1) - edge(a.y, 1) || edge(a.x, 0) - edge(b.x, 0)
  ));
  for (const panel of sorted) {
    const centre = (edge(panel.x, 0) + edge(panel.x, 1)) / 2;
    panel.title = (layout.annotations ?? []).findIndex((note) => (
      note.xref === "paper" && note.yref === "paper" && note.yanchor === "bottom"
      && Math.abs(note.x - centre) < 0.02 && Math.abs(note.y - edge(panel.y, 1)) < 0.03
    ));
  }
  return sorted;
}

// Set width, margins and the places of panels: as they were made, or, where it is narrow, one under
// the other.
async function arrange(figure, state, width = plotOf(figure).clientWidth) {
  const plot = plotOf(figure);
  const {layout} = state;
  const panels = panelsOf(plot.data, layout);
  const isNarrow = width < NARROW;
  const margin = layout.margin ?? {};
  const hasPanelTitles = panels.some((panel) => panel.title >= 0);
  const top = Math.min(margin.t ?? 80, hasPanelTitles ? 58 : 34);
  const bottom = layout.sliders?.length ? Math.min(margin.b ?? 80, 56) : margin.b ?? 80;
  const isStacked = isNarrow && panels.length > 1;
  const spared = (margin.t ?? 80) - top + (margin.b ?? 80) - bottom;
  let height = (layout.height ?? 450) - spared;
  const changes = {"margin.t": top, "margin.b": bottom};
  changes["margin.l"] = isNarrow ? Math.min(margin.l ?? 80, 48) : margin.l ?? 80;
  changes["margin.r"] = isNarrow ? Math.min(margin.r ?? 80, 12) : margin.r ?? 80;
  const gap = 108; // between stacked panels: labels of one, title of the next
  if (isStacked) height = top + bottom + panels.length * PANEL_HEIGHT + (panels.length - 1) * gap;
  const inner = height - top - bottom;
  panels.forEach((panel, place) => {
    const from = 1 - (place * (PANEL_HEIGHT + gap) + PANEL_HEIGHT) / inner;
    const upTo = 1 - (place * (PANEL_HEIGHT + gap)) / inner;
    changes[`${panel.x}.domain`] = isStacked ? [0, 1] : layout[panel.x]?.domain ?? [0, 1];
    changes[`${panel.y}.domain`] = isStacked ? [Math.max(0, from), upTo] : layout[panel.y]?.domain ?? [0, 1];
    for (const axis of [panel.x, panel.y]) {
      changes[`${axis}.showticklabels`] = isStacked || (layout[axis]?.showticklabels ?? true);
    }
    if (panel.title >= 0) {
      const note = layout.annotations[panel.title];
      changes[`annotations[${panel.title}].x`] = isStacked ? 0.5 : note.x;
      changes[`annotations[${panel.title}].y`] = isStacked ? upTo : note.y;
      changes[`annotations[${panel.title}].text`] = isNarrow ? wrap(note.text, 44) : note.text;
    }
  });
  for (const name of Object.keys(layout)) {
    if (!/^coloraxis\d*$/.test(name)) continue;
    const bar = layout[name].colorbar ?? {};
    changes[`${name}.colorbar.thickness`] = isNarrow ? 9 : bar.thickness ?? 30;
    changes[`${name}.colorbar.title.side`] = isNarrow ? "right" : bar.title?.side ?? "top";
  }
  Object.assign(changes, {width, height});
  await Plotly.relayout(plot, changes);
  const legend = plot._fullLayout.legend?._height ?? 0;
  state.firstLegend ??= legend;
  const room = isStacked ? 0 : Math.min(state.firstLegend, LEGEND_ROOM);
  if (legend > room) await Plotly.relayout(plot, {height: changes.height + legend - room});
}

function wrap(words, longest) {
  const lines = [""];
  for (const word of plain(words).split(" ")) {
    const line = lines.at(-1);
    if (line && line.length + word.length >= longest) lines.push(word);
    else lines[lines.length - 1] = line ? `${line} ${word}` : word;
  }
  return lines.join("<br>");
}

// ------------------------------------------------------------ what changes a figure: HTML controls

function addControls(figure, state) {
  const box = figure.querySelector(".controls");
  const {layout} = state;
  box.replaceChildren();
  state.toggles = [];
  state.menus = (layout.updatemenus ?? []).map((menu) => addMenu(figure, state, menu, box));
  if (layout.sliders?.length) addSlider(figure, state, layout.sliders[0], box);
}

function addMenu(figure, state, menu, box) {
  const steps = menu.buttons.filter((step) => !step.args2); // one of these is chosen
  const toggles = menu.buttons.filter((step) => step.args2); // each of these is on or off
  const control = {steps, active: menu.active ?? 0};
  if (menu.type === "buttons") {
    const buttons = steps.map((step, place) => element("button", {
      type: "button",
      textContent: step.label,
      onclick: () => control.choose(place).then(() => noteState(figure)),
    }));
    const group = element("div", {}, buttons);
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "View");
    control.mark = () => buttons.forEach((button, place) => (
      button.setAttribute("aria-pressed", String(place === control.active))
    ));
    control.active = beginning(steps, state);
    box.append(group);
    for (const step of toggles) addToggle(figure, state, step, box);
  } else {
    const options = steps.map((step) => element("option", {textContent: step.label}));
    const select = element("select", {
      onchange: () => control.choose(select.selectedIndex).then(() => noteState(figure)),
    }, options);
    control.mark = () => { select.selectedIndex = control.active; };
    const words = layoutMeta(state).examples ? "example" : "show";
    box.append(element("label", {}, [words, select]));
  }
  control.choose = async (place) => {
    control.active = place;
    control.mark();
    await perform(figure, state, steps[place]);
  };
  control.mark();
  return control;
}

function addToggle(figure, state, step, box) {
  const button = element("button", {type: "button", textContent: step.label});
  const toggle = {key: step.label, isOn: false};
  const mark = () => button.setAttribute("aria-pressed", String(toggle.isOn));
  toggle.turn = async (isOn) => {
    toggle.isOn = isOn;
    mark();
    await perform(figure, state, {method: step.method, args: isOn ? step.args : step.args2});
    await arrange(figure, state); // the legend has other entries
  };
  button.onclick = () => toggle.turn(!toggle.isOn).then(() => noteState(figure));
  mark();
  box.append(button);
  state.toggles.push(toggle);
}

// Return which button's view a figure begins with: the one whose axis title it has.
function beginning(steps, state) {
  const title = state.layout.xaxis?.title?.text;
  const place = steps.findIndex((step) => step.args?.[1]?.["xaxis.title.text"] === title);
  return Math.max(0, place);
}

function layoutMeta(state) {
  return state.layout.meta ?? {};
}

function addSlider(figure, state, slider, box) {
  const words = (slider.currentvalue?.prefix ?? "").trim().replace(/[:=]$/, "") || "step";
  const input = element("input", {type: "range", min: 0});
  const output = element("output");
  const key = words.includes("layer") ? "layer" : words; // its name in an address
  const control = {words, key, active: slider.active ?? 0};
  control.useSteps = (steps) => {
    control.steps = steps;
    input.max = steps.length - 1;
    control.active = Math.min(control.active, steps.length - 1);
  };
  control.mark = () => {
    const {label} = control.steps[control.active];
    input.value = control.active;
    input.setAttribute("aria-valuetext", `${words} ${label}`);
    output.textContent = label;
  };
  control.choose = async (place) => {
    control.active = place;
    control.mark();
    await perform(figure, state, control.steps[place]);
  };
  input.oninput = () => control.choose(Number(input.value)).then(() => noteState(figure));
  control.useSteps(slider.steps);
  control.mark();
  box.append(element("label", {}, [words, input, output]));
  state.slider = control;
}

async function perform(figure, state, step) {
  const plot = plotOf(figure);
  const args = structuredClone(step.args);
  const place = {update: 1, relayout: 0}[step.method];
  const changes = place === undefined ? {} : args[place] ?? {};
  const title = changes["title.text"] ?? changes.title?.text;
  const steps = changes.sliders?.[0]?.steps;
  for (const part of ["title", "title.text", "sliders", "template"]) delete changes[part];
  await Plotly[step.method](plot, ...args);
  if (title !== undefined) {
    state.title = title;
    figure.querySelector(".title").innerHTML = "";
    figure.querySelector(".title").textContent = plain(title);
  }
  if (steps && state.slider) {
    state.slider.useSteps(steps);
    await state.slider.choose(state.slider.active);
  }
  refreshNumbers(figure);
}

// ------------------------------------------------------------------------------ links and states

function addressOf(figure) {
  const state = states.get(figure.dataset.name) ?? {};
  const address = new URLSearchParams({figure: figure.dataset.name});
  (state.menus ?? []).forEach((menu) => {
    const example = state.layout.meta?.examples?.[menu.active];
    if (example) {
      address.set("task", example.task);
      address.set("model", state.layout.meta.model);
      address.set("image", example.image);
      address.set("order", example.order);
    } else {
      address.set("view", menu.steps[menu.active].label);
    }
  });
  for (const toggle of state.toggles ?? []) {
    if (toggle.isOn) address.set(toggle.key, "1");
  }
  if (state.slider) address.set(state.slider.key, state.slider.steps[state.slider.active].label);
  return `#${address}`;
}

function noteState(figure) {
  history.replaceState(null, "", addressOf(figure));
}

async function copyLink(figure) {
  noteState(figure);
  const link = location.href;
  try {
    await navigator.clipboard.writeText(link);
  } catch {
    const field = element("textarea", {value: link});
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  say("The link is copied");
}

// Open what the address names: a figure and its state, a single example, or a tab.
async function followAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  if (address.has("tab")) {
    const tab = byId(`tab-${address.get("tab")}`);
    if (tab) {
      openPanels(tab);
      await selectTab(tab);
    } else say("This page has no such tab");
    return;
  }
  const figures = [...document.querySelectorAll("figure")];
  let figure = figures.find((other) => other.dataset.name === address.get("figure"));
  if (!figure && !address.has("figure") && (address.has("model") || address.has("task"))) {
    figure = figures.find((other) => (
      other.dataset.model && other.dataset.model === (address.get("model") ?? other.dataset.model)
    ));
  }
  if (figure) {
    await openFigure(figure, address);
  } else if (address.has("figure") || address.has("model") || address.has("task")) {
    say("This page has no such figure or example");
  }
}

async function openFigure(figure, address) {
  openPanels(figure);
  await drawFigure(figure);
  const state = states.get(figure.dataset.name);
  for (const menu of state.menus ?? []) {
    const examples = state.layout.meta?.examples;
    const place = examples ? findExample(examples, address) : menu.steps.findIndex(
      (step) => step.label === address.get("view"));
    if (place >= 0 && place !== menu.active) await menu.choose(place);
  }
  for (const toggle of state.toggles ?? []) {
    const isOn = address.get(toggle.key) === "1";
    if (isOn !== toggle.isOn) await toggle.turn(isOn);
  }
  if (state.slider && address.has(state.slider.key)) {
    const wanted = address.get(state.slider.key);
    const place = state.slider.steps.findIndex((step) => (
      step.label === wanted || Number(step.label.replace(/^\D+/, "")) === Number(wanted)
    ));
    if (place >= 0) await state.slider.choose(place);
    else say(`There is no ${state.slider.words} ${wanted} here`);
  }
  const title = figure.querySelector(".title");
  title.tabIndex = -1;
  title.focus({preventScroll: true});
  figure.scrollIntoView({block: "start"});
  drawOpenTab();
}

// Choose the tabs behind which something stands.
function openPanels(inner) {
  for (let node = inner.parentElement; node; node = node.parentElement) {
    if (node.getAttribute("role") === "tabpanel") markTab(byId(node.getAttribute("aria-labelledby")));
  }
}

function findExample(examples, address) {
  return examples.findIndex((example) => ["task", "image", "order"].every((name) => (
    !address.has(name) || address.get(name) === example[name]
  )));
}

// ------------------------------------------------------------------------------------------ tabs

function markTab(tab) {
  for (const other of tab.parentElement.querySelectorAll("[role=tab]")) {
    const isSelected = other === tab;
    other.setAttribute("aria-selected", String(isSelected));
    other.tabIndex = isSelected ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !isSelected;
  }
}

async function selectTab(tab) {
  const shown = [...document.querySelectorAll(".kinds [aria-selected=true]")];
  const kind = shown.find((other) => other.offsetParent)?.textContent;
  markTab(tab);
  const panel = byId(tab.getAttribute("aria-controls"));
  const alike = [...panel.querySelectorAll(".kinds [role=tab]")];
  const same = alike.find((other) => other.textContent === kind);
  if (same) markTab(same);
  const chosen = same ?? panel.querySelector(".kinds [aria-selected=true]") ?? tab;
  history.replaceState(null, "", `#tab=${chosen.id.replace(/^tab-/, "")}`);
  await drawOpenTab();
}

function onTabKey(event) {
  const tabs = [...event.currentTarget.querySelectorAll("[role=tab]")];
  const place = tabs.indexOf(document.activeElement);
  const steps = {ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tabs.length - 1};
  if (!(event.key in steps) || place < 0) return;
  event.preventDefault();
  const tab = tabs[(steps[event.key] + tabs.length) % tabs.length];
  tab.focus();
  selectTab(tab);
}

function isShown(figure) {
  return figure.offsetParent !== null;
}

async function drawOpenTab() {
  for (const figure of document.querySelectorAll("figure")) {
    if (!isShown(figure)) continue;
    await drawFigure(figure);
    const plot = plotOf(figure);
    const state = states.get(figure.dataset.name);
    if (!isShown(figure) || !isDrawn(figure)) continue;
    if (plot.clientWidth !== plot.layout.width) await arrange(figure, state);
  }
}

// ------------------------------------------------------------------- the numbers behind a figure

// Return words without Plotly's tags; other angle brackets stand in prompts.
const TAGS = /<\/?(?:b|i|span|sub|sup|a|extra)(?:\s[^>]*)?>/g;
function plain(words) {
  const text = String(words).replace(/<br\s*\/?>/g, " ").replace(TAGS, "");
  return text.replace(/\s+/g, " ").trim();
}

// Return what is shown as rows, with the names of their columns.
function rowsOf(figure) {
  const {data, layout} = plotOf(figure);
  const state = states.get(figure.dataset.name);
  const panels = panelsOf(data, state.layout);
  const panelNames = new Map(panels.map((panel) => (
    [panel.x + panel.y, plain(state.layout.annotations?.[panel.title]?.text ?? "")]
  )));
  const axisWords = (axis, depth = 0) => {
    const title = layout[axis]?.title?.text;
    if (title || depth > 2) return plain(title ?? "");
    const other = layout[axis]?.matches ?? layout[axis]?.scaleanchor;
    return other ? axisWords(`${other[0]}axis${other.slice(1)}`, depth + 1) : "";
  };
  const rows = [];
  for (const trace of data) {
    const x = `xaxis${(trace.xaxis ?? "x").slice(1)}`;
    const y = `yaxis${(trace.yaxis ?? "y").slice(1)}`;
    const template = String(trace.hovertemplate ?? "");
    const isUnnamed = trace.visible === false || ["skip", "text"].includes(trace.hoverinfo);
    if (trace.meta?.is_mark || (isUnnamed && !template)) continue;
    const row = {panel: panelNames.get(x + y) ?? "", series: seriesName(trace, template)};
    const axes = {x: axisWords(x), y: axisWords(y)};
    axes.places = [x, y].filter((axis) => layout[axis]?.ticktext).map((axis) => axis[0]);
    if (trace.type === "heatmap") rows.push(...cellRows(trace, template, row, axes));
    else rows.push(...pointRows(trace, template, row, axes));
  }
  for (const row of rows) row.values = context(state).concat(row.values);
  return tableOf(rows);
}

// Name the example, or where the slider stands: what is shown depends on it.
function context(state) {
  const example = state.layout.meta?.examples?.[state.menus?.[0]?.active];
  if (example) return [["task", example.task], ["image", example.image]];
  const {slider} = state;
  return slider ? [[`${slider.words} of the slider`, slider.steps[slider.active].label]] : [];
}

function seriesName(trace, template) {
  if (trace.name) return plain(trace.name);
  const bold = template.match(/<b>([^%]*?)<\/b>/);
  if (bold) return plain(bold[1]);
  if (trace.type === "heatmap") return "";
  const first = template.split("<br>")[0].split(/,?\s*%\{/)[0];
  return plain(first).replace(/[,:]$/, "");
}

// Find out what the numbers that hovering shows are called: lo, hi, n, or the words before them.
function detailsOf(template) {
  const details = new Map();
  const constants = [];
  const interval = template.match(/\[%\{customdata\[(\d+)\][^}]*\},\s*%\{customdata\[(\d+)\]/);
  if (interval) details.set(Number(interval[1]), "lo").set(Number(interval[2]), "hi");
  const fixed = template.match(/\[([-+]?[\d.]+)%?, ([-+]?[\d.]+)%?\]/);
  if (fixed) constants.push(["lo", Number(fixed[1])], ["hi", Number(fixed[2])]);
  const count = template.match(/n = ([\d,]+)/);
  if (count) constants.push(["n", Number(count[1].replaceAll(",", ""))]);
  const pattern = /([^{}]*)%\{customdata(?:\[(\d+)\])?([^}]*)\}\s*(\w*)/g;
  for (const [, before, index, format, after] of template.matchAll(pattern)) {
    const place = index === undefined ? -1 : Number(index);
    if (details.has(place)) continue;
    const words = plain(before.split(/<br>/).pop()).replace(/^.*[,(]/, "").replace(/[:=(\s]+$/, "").trim();
    const name = (words === "of" ? after : words) || {":.1%": "share"}[format] || (format === "" && (place <= 0) ? "at" : "");
    if (name) details.set(place, name);
  }
  return {details, constants};
}

function detailValues(details, custom) {
  if (custom === undefined || custom === null) return [];
  return [...details].map(([place, name]) => [name, plain_value(place < 0 ? custom : custom[place])]);
}

function plain_value(value) {
  return typeof value === "string" ? plain(value) : value;
}

function pointRows(trace, template, row, axes) {
  const {details, constants} = detailsOf(template);
  const rows = [];
  const xs = trace.x ?? [];
  const ys = trace.y ?? [];
  for (let place = 0; place < Math.max(xs.length, ys.length); place += 1) {
    const x = xs[place] ?? null;
    const y = ys[place] ?? null;
    if (x === null || y === null) continue;
    rows.push({...row, axes, x, y, values: [...detailValues(details, trace.customdata?.[place]), ...constants]});
  }
  return rows;
}

function cellRows(trace, template, row, axes) {
  const {details} = detailsOf(template);
  const words = template.match(/([^<>{}\[\]]*)%\{z/)?.[1].replace(/^[:,\s]+|[:=\s]+$/g, "");
  const rows = [];
  trace.z.forEach((cells, i) => cells.forEach((z, j) => {
    if (z === null || z === undefined) return;
    const cell = {x: trace.x?.[j] ?? j, y: trace.y?.[i] ?? i, z, zName: plain(words ?? "") || "value"};
    rows.push({...row, ...cell, axes, values: detailValues(details, trace.customdata?.[i]?.[j])});
  }));
  return rows;
}

// Put rows under common headings; what is the same or empty everywhere has none.
function tableOf(rows) {
  const names = (pick) => [...new Set(rows.map(pick))].filter(Boolean);
  const xNames = names((row) => row.axes.x);
  const yNames = names((row) => row.axes.y);
  const hasPanels = names((row) => row.panel).length > 1;
  const records = rows.map((row) => {
    const record = {};
    if (hasPanels) record.panel = row.panel;
    if (row.series) record.series = row.series;
    if (yNames.length > 1 && row.z === undefined) record.measure = row.axes.y;
    const xName = xNames.length === 1 ? xNames[0] : "x";
    const yName = yNames.length === 1 ? yNames[0] : row.z === undefined ? "value" : "y";
    if (!isPlace(row, "x")) record[xName] = plain_value(row.x);
    if (!isPlace(row, "y")) record[yName] = plain_value(row.y);
    if (row.z !== undefined) record[row.zName] = row.z;
    return Object.assign(record, Object.fromEntries(row.values));
  });
  const headings = [...new Set(records.flatMap((record) => Object.keys(record)))];
  return {headings, cells: records.map((record) => headings.map((name) => digits(record[name])))};
}

// Say whether a coordinate is only where a point is drawn: "at" names what stands there.
function isPlace(row, axis) {
  return row.z === undefined && row.axes.places.includes(axis) && row.values.some(([name]) => name === "at");
}

function digits(value) {
  if (value === undefined || value === null) return "";
  return typeof value === "number" ? String(Number(value.toPrecision(6))) : String(value);
}

function refreshNumbers(figure) {
  const details = figure.querySelector(".numbers");
  details.querySelector(".scroll")?.remove();
  if (!details.open || !isDrawn(figure)) return;
  const {headings, cells} = rowsOf(figure);
  const head = element("tr", {}, headings.map((name) => element("th", {scope: "col", textContent: name})));
  const body = cells.map((row) => element("tr", {}, row.map((text) => element("td", {textContent: text}))));
  const table = element("table", {}, [element("thead", {}, [head]), element("tbody", {}, body)]);
  const box = element("div", {className: "scroll", tabIndex: 0}, [table]);
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", `Numbers: ${plain(states.get(figure.dataset.name).title)}`);
  details.append(box);
}

// ---------------------------------------------------------------------------------- files to save

function csvOf(figure) {
  const {headings, cells} = rowsOf(figure);
  const quote = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return `${[headings, ...cells].map((row) => row.map(quote).join(",")).join("\n")}\n`;
}

function save(name, blob) {
  const link = element("a", {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// A picture is as wide as in a paper and light, with its title, whatever the page looks like.
async function savePicture(figure, format) {
  const plot = plotOf(figure);
  const state = states.get(figure.dataset.name);
  const {layout} = state;
  const drawn = structuredClone(plot.layout);
  for (const [name, axis] of Object.entries(layout)) {
    if (/^[xy]axis/.test(name)) {
      drawn[name].domain = axis.domain;
      drawn[name].showticklabels = axis.showticklabels;
    }
  }
  const {slider} = state;
  const where = slider ? `, ${slider.words} ${slider.steps[slider.active].label}` : "";
  Object.assign(drawn, {
    annotations: layout.annotations,
    height: layout.height,
    legend: layout.legend,
    margin: slider ? {...layout.margin, b: 60} : layout.margin,
    template: THEMES.light,
    title: {...layout.title, text: state.title + where},
    width: layoutMeta(state).width ?? 1000,
  });
  await Plotly.downloadImage({data: plot.data, layout: drawn}, {
    format,
    filename: figure.dataset.name,
    width: drawn.width,
    height: drawn.height ?? 450,
    scale: format === "png" ? 2 : 1,
  });
}

async function act(event) {
  const action = event.target.dataset?.action;
  const figure = event.target.closest("figure");
  if (!action || !figure) return;
  await drawFigure(figure);
  if (!isDrawn(figure)) return; // why is in the status
  if (action === "link") await copyLink(figure);
  else if (action === "csv") save(`${figure.dataset.name}.csv`, new Blob([csvOf(figure)], {type: "text/csv"}));
  else await savePicture(figure, action);
}

// ------------------------------------------------------------------------------ sorting a table

function sortBy(head) {
  const row = head.parentElement;
  const place = [...row.children].indexOf(head);
  const direction = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of row.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction);
  const body = head.closest("table").tBodies[0];
  const sign = direction === "ascending" ? 1 : -1;
  const keyOf = (line) => line.children[place].dataset.key;
  const sorted = [...body.rows].sort((a, b) => {
    const [first, second] = [keyOf(a), keyOf(b)];
    if (first === undefined || second === undefined) {
      return (first === undefined) - (second === undefined); // what was not measured comes last
    }
    const difference = Number(first) - Number(second);
    return sign * (Number.isNaN(difference) ? first.localeCompare(second) : difference);
  });
  body.append(...sorted);
}

// ------------------------------------------------------------------------------------- beginning

function begin() {
  byId("theme").textContent = root.classList.contains("dark") ? "light" : "dark";
  byId("theme").onclick = () => setTheme(!root.classList.contains("dark"));
  prefersDark.onchange = () => setTheme(prefersDark.matches);
  for (const list of document.querySelectorAll("[role=tablist]")) {
    list.addEventListener("keydown", onTabKey);
    list.addEventListener("click", (event) => {
      if (event.target.matches("[role=tab]")) selectTab(event.target);
    });
  }
  for (const button of document.querySelectorAll(".overview th button")) {
    button.onclick = () => sortBy(button.parentElement);
  }
  for (const cell of document.querySelectorAll(".overview td")) {
    const text = cell.textContent.trim();
    if (text.startsWith("✓")) cell.classList.add("good");
    else if (text.startsWith("above chance") || text.includes(", no better")) cell.classList.add("word");
  }
  const notes = byId("notes");
  if (notes) notes.onclick = () => {
    const isOn = document.querySelector(".overview").classList.toggle("noted");
    notes.setAttribute("aria-pressed", String(isOn));
  };
  document.addEventListener("click", act);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link?.hash === location.hash) followAddress(); // the address does not change
  });
  for (const details of document.querySelectorAll(".numbers")) {
    details.addEventListener("toggle", async () => {
      const figure = details.closest("figure");
      await drawFigure(figure);
      refreshNumbers(figure);
    });
  }
}

async function beginFigures() {
  await followAddress();
  const first = document.querySelector("figure");
  if (first && isShown(first)) await drawFigure(first);
  setTimeout(drawOpenTab, 50);
}

// A sheet of paper is light, and as wide as this.
const PAPER_WIDTH = 690;

function onPrint(isPrinting) {
  for (const figure of document.querySelectorAll("figure")) {
    const plot = plotOf(figure);
    if (!isDrawn(figure)) continue;
    Plotly.relayout(plot, {template: THEMES[isPrinting ? "light" : themeName()]});
    if (!isPrinting && !isShown(figure)) continue; // it is fitted when its tab is opened
    arrange(figure, states.get(figure.dataset.name), isPrinting ? PAPER_WIDTH : plot.clientWidth);
  }
}

document.addEventListener("readystatechange", () => {
  if (document.readyState === "interactive") begin();
});
document.addEventListener("DOMContentLoaded", beginFigures);
addEventListener("hashchange", followAddress);
addEventListener("beforeprint", () => onPrint(true));
addEventListener("afterprint", () => onPrint(false));
let resizing = 0;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(drawOpenTab, 150);
});
