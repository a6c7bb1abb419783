// What memtrackd sees, drawn. The server sends a snapshot, then what changes.

const KEPT = 4096; // changes of a client
const KEPT_REGIONS = 1024; // of a client, after they were unregistered
const CARDS = 100; // more are not drawn: filter
const LISTED = 40; // latest changes
const BLOCK = 7; // width of a change on the map, in CSS pixels
const PAGE = 4096n;

// In the order of what matters most, if there are several. What is told apart by
// colour is told apart by its pattern, too.
const KINDS = [
  ["unmap", "unmapped; on the driver, also moved elsewhere", "solid"],
  ["move", "moved elsewhere", "rising"],
  ["clear", "pages were taken away or exchanged", "dots"],
  ["protect_mapping", "the protection of a mapping changed", "rows"],
  ["protect_page", "the protection of pages changed", "columns"],
  ["migrate", "pages move to or from a device", "falling"],
  ["exclusive", "a device gets pages for itself", "grid"],
  ["soft_dirty", "somebody watches which pages are written to", "chequer"],
  ["end", "the process ends, or calls exec", "cross"],
  ["changed", "the backend does not tell why", "frame"],
].map(([name, text, pattern], index) => ({ name, text, pattern, index }));
const KIND = new Map(KINDS.map((kind) => [kind.name, kind]));

const HINT = "Point at the map, or focus it and press the arrow keys, for details.";

const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");

const clients = new Map();
const latest = [];
const visible = new Set();
let skew = 0; // the server's clock, before ours
let span = 60; // seconds shown; Infinity: all
let frozen = null; // the time at which it is paused
let words = []; // of the filter
const unwanted = new Set(); // kinds of changes that are not shown
let total = 0;
let theme = null;

const now = () => frozen ?? Date.now() / 1000 + skew;
const count = new Intl.NumberFormat("en").format;
const spaced = (name) => name.replaceAll("_", " ");
const plural = (n, one) => `${count(n)} ${one}${n === 1 ? "" : "s"}`;
// Names are the clients': they shall not turn the text around them.
const isolated = (text) => `\u2068${text}\u2069`;

function clock(time) {
  const date = new Date(time * 1000);
  const two = (n) => String(n).padStart(2, "0");
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}` +
    `.${String(date.getMilliseconds()).padStart(3, "0")}`;
}

function pages(start, end) {
  return plural(Number((end + PAGE - 1n) / PAGE - start / PAGE), "page");
}

// What to draw a change as: what matters most, of what is to be seen.
const kindOf = (change) => change.kinds.find((kind) => !unwanted.has(kind));

// --- what there is

class Client {
  constructor(message) {
    Object.assign(this, message);
    this.count = message.changes;
    this.table = new Map(); // by cookie: the region that it means now
    this.regions = []; // also those that are gone
    this.live = 0;
    this.changes = [];
    this.layout = null;
    for (const region of message.regions) this.add(region);
    for (const [time, ...row] of message.history) this.changed(time, row);
    this.card = null;
  }

  add(row) {
    const old = this.table.get(row.cookie);
    if (old && old.ended === null) this.drop(row.cookie, row.since);
    const region = {
      cookie: row.cookie, name: row.name, since: row.since, ended: row.ended,
      start: BigInt(row.start), end: BigInt(row.end), y: 0, height: 0, known: true,
    };
    if (region.ended === null) this.live += 1;
    this.table.set(row.cookie, region);
    this.regions.push(region);
    this.layout = null;
    return region;
  }

  drop(cookie, time) {
    const region = this.table.get(cookie);
    if (!region || region.ended !== null) return;
    region.ended = time;
    this.live -= 1;
    this.trim();
  }

  trim() {
    const gone = this.regions.length - this.live;
    // Not for each one: it costs a walk through all.
    if (gone <= 2 * KEPT_REGIONS) return;
    let surplus = gone - KEPT_REGIONS;
    this.regions = this.regions.filter((region) => {
      const out = region.ended !== null && surplus > 0;
      if (out) {
        surplus -= 1;
        if (this.table.get(region.cookie) === region) this.table.delete(region.cookie);
      }
      return !out;
    });
    this.layout = null;
  }

  changed(time, [cookie, start, end, exact, causes]) {
    const change = {
      time, cookie, exact, causes, client: this,
      start: BigInt(start), end: BigInt(end),
      kinds: KINDS.filter((kind) => causes.includes(kind.name)),
      region: this.table.get(cookie), layout: null, y: 0, height: 0,
    };
    if (!change.region) {
      change.region = this.add({
        cookie, name: `cookie ${cookie}`, start, end, since: time, ended: time,
      });
      change.region.known = false;
    }
    if (!change.kinds.length) change.kinds = [KIND.get("changed")];
    this.changes.push(change);
    if (this.changes.length > 2 * KEPT) this.changes.splice(0, this.changes.length - KEPT);
    return change;
  }

  matches() {
    const texts = [this.name, this.program].map((text) => text.toLowerCase());
    return words.every((word) => texts.some((text) => text.includes(word)) ||
      this.regions.some((region) => region.name.toLowerCase().includes(word)));
  }
}

// --- from addresses to heights

// Regions that overlap share a segment. A far way between two segments is cut short,
// and marked. Large regions get more height than small ones, but not in proportion.
function layOut(client, height) {
  const sorted = client.regions.toSorted((a, b) =>
    a.start < b.start ? -1 : a.start > b.start ? 1 : 0);
  const segments = [];
  for (const region of sorted) {
    const last = segments.at(-1);
    if (last && region.start < last.end) {
      if (region.end > last.end) last.end = region.end;
    } else {
      segments.push({ start: region.start, end: region.end, gap: 0 });
    }
  }
  let weights = 0;
  let gaps = 0;
  for (const [i, segment] of segments.entries()) {
    segment.weight = 1 + Math.log2(1 + Number(segment.end - segment.start) / 4096);
    weights += segment.weight;
    if (i > 0) {
      const far = segment.start - segments[i - 1].end;
      segment.far = far > 16n * PAGE;
      segment.gap = far === 0n ? 0 : segment.far ? 9 : 2;
      gaps += segment.gap;
    }
  }
  const squeeze = gaps > height / 4 ? height / 4 / gaps : 1;
  const unit = (height - gaps * squeeze) / (weights || 1);
  let y = 0;
  for (const segment of segments) {
    segment.gap *= squeeze;
    y += segment.gap;
    segment.y = y;
    segment.height = segment.weight * unit;
    y += segment.height;
  }
  const layout = { height, segments };
  for (const region of client.regions) place(layout, region);
  client.layout = layout;
}

function heightOf(layout, address) {
  const { segments } = layout;
  let low = 0;
  let high = segments.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (segments[middle].start <= address) low = middle; else high = middle;
  }
  const segment = segments[low];
  if (!segment) return 0;
  const part = Number(address - segment.start) / Number(segment.end - segment.start);
  return segment.y + Math.min(Math.max(part, 0), 1) * segment.height;
}

function place(layout, thing) {
  thing.y = heightOf(layout, thing.start);
  thing.height = heightOf(layout, thing.end - 1n) - thing.y;
  thing.layout = layout;
}

// --- drawing

function pattern(context, kind, colour, loose) {
  const size = 6;
  const tile = new OffscreenCanvas(size, size);
  const pen = tile.getContext("2d");
  pen.globalAlpha = loose ? 0.22 : kind.pattern === "solid" ? 1 : 0.35;
  pen.fillStyle = pen.strokeStyle = colour;
  pen.fillRect(0, 0, size, size);
  pen.globalAlpha = loose ? 0.6 : 1;
  pen.lineWidth = loose ? 1 : 2;
  const line = (...points) => {
    pen.beginPath();
    for (let i = 0; i < points.length; i += 4) {
      pen.moveTo(points[i], points[i + 1]);
      pen.lineTo(points[i + 2], points[i + 3]);
    }
    pen.stroke();
  };
  const rising = [0, size, size, 0, -1, 1, 1, -1, size - 1, size + 1, size + 1, size - 1];
  switch (loose ? "rising" : kind.pattern) {
    case "rising": line(...rising); break;
    case "falling": line(0, 0, size, size, -1, size - 1, 1, size + 1, size - 1, -1, size + 1, 1); break;
    case "dots": pen.fillRect(1, 1, 3, 3); break;
    case "rows": line(0, 2, size, 2); break;
    case "columns": line(2, 0, 2, size); break;
    case "grid": line(0, 1, size, 1, 1, 0, 1, size); break;
    case "chequer": pen.fillRect(0, 0, 3, 3); pen.fillRect(3, 3, 3, 3); break;
    case "cross": line(0, 0, size, size, 0, size, size, 0); break;
    default: break;
  }
  return context.createPattern(tile, "repeat");
}

function readTheme() {
  const style = getComputedStyle(root);
  const value = (name) => style.getPropertyValue(`--${name}`).trim();
  const context = new OffscreenCanvas(1, 1).getContext("2d");
  theme = {
    text: value("text"), quiet: value("quiet"), map: value("map"), grid: value("grid"),
    region: value("region"), edge: value("region-line"), accent: value("accent"),
    colours: KINDS.map((kind) => value(kind.name)),
  };
  theme.exact = KINDS.map((kind, i) => pattern(context, kind, theme.colours[i], false));
  theme.loose = KINDS.map((kind, i) => pattern(context, kind, theme.colours[i], true));
  drawLegend();
  for (const client of clients.values()) mark(client);
}

function block(context, kind, exact, x, y, width, height) {
  if (height < 5) {
    // Too small for a pattern.
    context.globalAlpha = exact ? 1 : 0.55;
    context.fillStyle = theme.colours[kind.index];
    context.fillRect(x, y, width, height);
    context.globalAlpha = 1;
  } else {
    context.fillStyle = (exact ? theme.exact : theme.loose)[kind.index];
    context.fillRect(x, y, width, height);
    context.strokeStyle = theme.colours[kind.index];
    context.setLineDash(exact ? [] : [2, 2]);
    context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
  }
}

// A kind of changes, to be shown or not.
function toggle(kind, ...content) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...content);
  button.setAttribute("aria-pressed", String(!unwanted.has(kind)));
  button.addEventListener("click", () => {
    const hiding = !unwanted.delete(kind);
    if (hiding) unwanted.add(kind);
    button.setAttribute("aria-pressed", String(!hiding));
    showLatest();
    for (const client of visible) mark(client);
  });
  return button;
}

function drawLegend() {
  const entry = (kind, text, title, exact) => {
    const item = document.createElement("li");
    item.title = title;
    const canvas = document.createElement("canvas");
    canvas.width = 36;
    canvas.height = 28;
    canvas.setAttribute("aria-hidden", "true");
    const context = canvas.getContext("2d");
    context.scale(2, 2);
    context.lineWidth = 1;
    block(context, kind, exact, 0, 0, 18, 14);
    if (exact) item.append(toggle(kind, canvas, text));
    else item.append(canvas, text);
    return item;
  };
  $("legend").replaceChildren(
    ...KINDS.map((kind) => entry(kind, spaced(kind.name), kind.text, true)),
    entry(KIND.get("changed"), "several, somewhere", "not exact: several changes of the region", false),
  );
}

function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  const letters = [...text];
  let low = 0;
  let high = letters.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (context.measureText(`${letters.slice(0, middle).join("")}…`).width <= width) low = middle;
    else high = middle;
  }
  return `${letters.slice(0, low).join("")}…`;
}

function extent(client) {
  const end = client.ended !== null && Number.isFinite(span) && client.ended < now() - span
    ? client.ended + span * 0.05 // what happened last, of who is long gone
    : now();
  if (Number.isFinite(span)) return [end - span, end];
  const first = Math.max(client.since, client.changes[0]?.time ?? client.since);
  return [Math.min(first, end - 10), end];
}

function draw(client) {
  const { canvas } = client.card;
  const { width, height } = client.card;
  if (!width || !height || !theme) return;
  const ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d", { alpha: false });
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = theme.map;
  context.fillRect(0, 0, width, height);
  context.lineWidth = 1;
  const axis = 16;
  const bottom = height - axis;
  if (!client.layout || client.layout.height !== bottom) layOut(client, bottom);
  const { layout } = client;
  const left = Math.min(Math.round(width * 0.27), 130);
  const [from, to] = extent(client);
  const scale = (width - left) / (to - from);
  const at = (time) => left + (time - from) * scale;
  client.view = { left, from, to, scale, bottom };

  // The axis of time.
  context.font = `11px ${getComputedStyle(canvas).fontFamily}`;
  context.textBaseline = "middle";
  const steps = [1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400];
  const step = steps.find((seconds) => seconds * scale >= 64) ?? 86400 * 7;
  for (let back = 0; to - back >= from; back += step) {
    const x = Math.round(at(to - back)) - 0.5;
    context.strokeStyle = theme.grid;
    context.beginPath();
    context.moveTo(x, 0);
    context.lineTo(x, bottom);
    context.stroke();
    context.fillStyle = theme.quiet;
    context.textAlign = back ? "center" : "right";
    const text = back >= 3600 ? `−${back / 3600} h` : back >= 60 ? `−${back / 60} min` : `−${back} s`;
    if (x > left + 20) {
      const label = back ? text : frozen === null && client.ended === null ? "now" : clock(to).slice(0, 8);
      context.fillText(label, back ? x : width - 2, height - axis / 2);
    }
  }

  // Regions, as long as they were there.
  context.setLineDash([]);
  context.textAlign = "left";
  let lastLabel = -Infinity;
  for (const region of client.regions) {
    const x0 = Math.max(at(region.since), left);
    const x1 = Math.min(at(region.ended ?? to), width);
    const tall = Math.max(region.height, 0.75);
    if (region.known && x1 > x0) {
      context.fillStyle = theme.region;
      context.fillRect(x0, region.y, x1 - x0, tall);
      if (tall > 5) {
        context.fillStyle = theme.edge;
        context.fillRect(x0, region.y, x1 - x0, 0.5);
      }
    }
  }
  for (const region of sortedByHeight(client, layout)) {
    if (region.y + region.height / 2 < lastLabel + 12) continue;
    if (region.ended !== null && region.ended < from) continue;
    lastLabel = Math.max(region.y + region.height / 2, 6);
    context.fillStyle = region.ended === null ? theme.text : theme.quiet;
    context.fillText(isolated(fitted(context, region.name, left - 8)), 3, Math.min(lastLabel, bottom - 5));
  }

  // Where addresses are left out.
  context.strokeStyle = theme.quiet;
  for (const segment of layout.segments) {
    if (!segment.far || segment.gap < 3) continue;
    const y = segment.y - segment.gap / 2;
    context.beginPath();
    for (let x = left; x <= width; x += 6) {
      context.lineTo(x, y + (((x - left) / 6) % 2 ? -1.5 : 1.5));
    }
    context.stroke();
  }

  // Changes, over the addresses that they hit.
  let drawn = 0;
  const done = new Set();
  context.save();
  context.beginPath();
  context.rect(left, 0, width - left, bottom);
  context.clip();
  for (let i = client.changes.length - 1; i >= 0; i -= 1) {
    const change = client.changes[i];
    if (change.time < from) break;
    if (change.time > to) continue;
    const kind = kindOf(change);
    if (!kind) continue;
    if (change.layout !== layout) place(layout, change);
    drawn += 1;
    const x = Math.round(at(change.time)) - BLOCK + 1;
    const tall = Math.max(change.height, 3);
    // Those under others are not seen.
    const key = `${x} ${Math.round(change.y)} ${Math.round(tall)} ${kind.index}`;
    if (done.has(key)) continue;
    done.add(key);
    block(context, kind, change.exact, x, Math.min(change.y, bottom - 3), BLOCK, tall);
  }
  const { chosen } = client;
  if (chosen?.layout === layout && chosen.time >= from) {
    context.setLineDash([]);
    context.lineWidth = 2;
    context.strokeStyle = theme.accent;
    const x = Math.round(at(chosen.time)) - BLOCK + 1;
    context.strokeRect(x - 3, chosen.y - 3, BLOCK + 6, Math.max(chosen.height, 3) + 6);
  }
  context.restore();
  canvas.dataset.drawn = drawn;
  canvas.dataset.regions = client.live;
}

function sortedByHeight(client, layout) {
  layout.sorted ??= client.regions.toSorted((a, b) => a.y - b.y);
  return layout.sorted;
}

// Frames only when something is new, or the picture has moved by a pixel.

const dirty = new Set();
let frame = 0;
let scrollTimer = 0;

function mark(client) {
  dirty.add(client);
  if (!frame) frame = requestAnimationFrame(paint);
}

function paint() {
  frame = 0;
  for (const client of dirty) {
    if (client.card && visible.has(client)) draw(client);
  }
  dirty.clear();
  if (!scrollTimer && frozen === null) {
    const moving = [...visible].filter((client) => client.ended === null || client.ended > now() - span);
    if (moving.length) {
      const width = Math.max(...moving.map((client) => client.card?.width ?? 0), 1);
      const seconds = Number.isFinite(span) ? span : 600;
      const pixel = (seconds * 1000) / width / (devicePixelRatio || 1);
      const wait = Math.min(Math.max(pixel, still.matches ? 1000 : 15), 2000);
      scrollTimer = setTimeout(() => {
        scrollTimer = 0;
        for (const client of visible) {
          if (client.ended === null || client.ended > now() - span - 5) mark(client);
        }
      }, wait);
    }
  }
}

// --- cards

const sizes = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const client = target.client;
    if (!client?.card) continue;
    client.card.width = contentRect.width;
    client.card.height = contentRect.height;
    mark(client);
  }
});

const sight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!target.client) continue;
    if (isIntersecting) {
      visible.add(target.client);
      mark(target.client);
    } else {
      visible.delete(target.client);
    }
  }
}, { rootMargin: "100px" });

function makeCard(client) {
  const element = $("card").content.firstElementChild.cloneNode(true);
  const part = (name) => element.querySelector(`.${name}`);
  element.dataset.client = client.id;
  part("name").textContent = client.name;
  part("program").textContent = isolated(client.program);
  part("pid").textContent = client.pid;
  part("user").textContent = isolated(client.user);
  part("backend").textContent = client.backend;
  const canvas = part("map");
  canvas.client = client;
  part("details").textContent = HINT;
  client.card = {
    element, canvas, width: 0, height: 0, badge: part("badge"), details: part("details"),
    counts: ["regions", "changes", "generation"].map(part),
  };
  canvas.setAttribute("aria-label",
    `Map of the memory of ${isolated(client.name)} over time. Arrow keys go from change to change.`);
  canvas.addEventListener("pointermove", (event) => point(client, event));
  canvas.addEventListener("pointerdown", (event) => point(client, event));
  canvas.addEventListener("pointerleave", () => choose(client, null));
  canvas.addEventListener("keydown", (event) => walk(client, event));
  canvas.addEventListener("blur", () => choose(client, null));
  sizes.observe(canvas);
  sight.observe(canvas);
  showCounts(client);
}

function dropCard(client) {
  if (!client.card) return;
  sizes.unobserve(client.card.canvas);
  sight.unobserve(client.card.canvas);
  visible.delete(client);
  dirty.delete(client);
  client.card.element.remove();
  client.card = null;
}

function showCounts(client) {
  const { card } = client;
  if (!card) return;
  const gone = client.ended !== null;
  const badge = gone ? `ended: ${client.reason} (${clock(client.ended).slice(0, 8)})` : "attached";
  if (card.badge.textContent !== badge) card.badge.textContent = badge;
  card.element.classList.toggle("gone", gone);
  card.element.dataset.state = gone ? "ended" : "attached";
  [client.live, client.count, client.generation].forEach((value, i) => {
    const text = count(value);
    if (card.counts[i].textContent !== text) card.counts[i].textContent = text;
  });
}

// Put the cards in their places: attached ones as they came, then those that ended.
function arrange() {
  const all = [...clients.values()].filter((client) => client.matches());
  const live = all.filter((client) => client.ended === null).sort((a, b) => a.id - b.id);
  const gone = all.filter((client) => client.ended !== null).sort((a, b) => b.ended - a.ended);
  const shown = new Set([...live, ...gone].slice(0, CARDS));
  for (const client of clients.values()) if (!shown.has(client)) dropCard(client);
  for (const [place, list] of [["attached", live], ["ended", gone]]) {
    let before = $(place).firstElementChild;
    for (const client of list) {
      if (!shown.has(client)) continue;
      if (!client.card) makeCard(client);
      if (client.card.element === before) before = before.nextElementSibling;
      else $(place).insertBefore(client.card.element, before);
    }
  }
  $("ended-heading").hidden = !gone.some((client) => shown.has(client));
  $("empty").hidden = shown.size > 0;
  $("empty").textContent = clients.size ? "No client or region is called that." : "No program has attached yet.";
  $("more").hidden = all.length <= shown.size;
  $("more").textContent = `and ${count(all.length - shown.size)} more: filter to see them`;
}

// --- details of one change or region

function describe(client, thing) {
  if (!thing) return [HINT];
  const name = document.createElement("bdi");
  const region = thing.region ?? thing;
  name.textContent = region.name;
  const range = `0x${thing.start.toString(16)}–0x${thing.end.toString(16)}`;
  if (!thing.kinds) {
    const until = thing.ended === null ? "" : `, until ${clock(thing.ended).slice(0, 8)}`;
    return [name, ` ${range}, ${pages(thing.start, thing.end)}, since ${clock(thing.since).slice(0, 8)}${until}`];
  }
  const where = thing.exact ? pages(thing.start, thing.end) : `somewhere in ${pages(thing.start, thing.end)}`;
  return [name, ` ${clock(thing.time)} ${causesOf(thing)}, ${range}, ${where}`];
}

function causesOf(change) {
  return change.causes.map(spaced).join(" + ") || "changed";
}

function choose(client, thing) {
  if (client.chosen === thing || !client.card) return;
  client.chosen = thing;
  client.card.details.replaceChildren(...describe(client, thing));
  mark(client);
}

function point(client, event) {
  const { view } = client;
  if (!view) return;
  const box = client.card.canvas.getBoundingClientRect();
  const x = event.clientX - box.left;
  const y = event.clientY - box.top;
  let best = null;
  let distance = 10;
  for (let i = client.changes.length - 1; i >= 0; i -= 1) {
    const change = client.changes[i];
    if (change.time < view.from) break;
    if (!kindOf(change)) continue;
    if (y < change.y - 4 || y > change.y + Math.max(change.height, 3) + 4) continue;
    const away = Math.abs(view.left + (change.time - view.from) * view.scale - BLOCK / 2 - x);
    if (away < distance) [best, distance] = [change, away];
  }
  best ??= client.regions.findLast((region) =>
    y >= region.y - 1 && y <= region.y + Math.max(region.height, 2)) ?? null;
  choose(client, best);
}

function walk(client, event) {
  const { chosen } = client;
  const changes = client.changes.filter(kindOf);
  const last = changes.length - 1;
  const here = chosen?.kinds ? changes.indexOf(chosen) : last + 1;
  const next = {
    ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last, Escape: -2,
  }[event.key];
  if (next === undefined || last < 0) return;
  event.preventDefault();
  choose(client, next === -2 ? null : changes[Math.min(Math.max(next, 0), last)]);
}

// --- the list, and what is read aloud

let listTimer = 0;
let spokenTimer = 0;
let unspoken = 0;

function noteLatest(all) {
  const changes = all.filter(kindOf);
  latest.push(...changes.slice(-LISTED));
  if (latest.length > 2 * LISTED) latest.splice(0, latest.length - LISTED);
  unspoken += changes.length;
  listTimer ||= setTimeout(showLatest, 500);
  spokenTimer ||= setTimeout(speak, 5000);
}

function showLatest() {
  listTimer = 0;
  if (frozen !== null) return;
  const labelled = (className, text) => {
    const element = document.createElement(className === "name" ? "bdi" : "span");
    element.className = className;
    element.textContent = text;
    return element;
  };
  const rows = latest.filter((change) => kindOf(change) && words.every((word) =>
    [change.client.name, change.client.program, change.region.name]
      .some((text) => text.toLowerCase().includes(word))));
  $("latest").replaceChildren(...rows.slice(-LISTED).reverse().map((change) => {
    const item = document.createElement("li");
    const size = pages(change.start, change.end);
    item.append(
      labelled("when", clock(change.time)), " ", labelled("name", change.client.name), " › ",
      labelled("name", change.region.name), " ", labelled("cause", causesOf(change)),
      labelled("where", `0x${change.start.toString(16)}–0x${change.end.toString(16)} ` +
        (change.exact ? size : `somewhere in ${size}`)),
    );
    return item;
  }));
}

function speak() {
  spokenTimer = 0;
  const change = latest.at(-1);
  if (frozen === null && change && unspoken) {
    $("announcer").textContent = `${plural(unspoken, "change")}; the last: ${isolated(change.client.name)}, ` +
      `${isolated(change.region.name)}, ${causesOf(change)}.`;
  }
  unspoken = 0;
}

// --- totals, a few times per second at most

let totalsTimer = 0;
let rates = [];

function soon() {
  totalsTimer ||= setTimeout(showTotals, 250);
}

function showTotals() {
  clearTimeout(totalsTimer);
  totalsTimer = 0;
  let attached = 0;
  let regions = 0;
  for (const client of clients.values()) {
    if (client.ended === null) {
      attached += 1;
      regions += client.live;
    }
    if (client.stale) {
      client.stale = false;
      showCounts(client);
    }
  }
  const time = performance.now() / 1000;
  rates = rates.filter(([then]) => then > time - 3);
  const recent = rates.reduce((sum, [, n]) => sum + n, 0) / 3;
  $("total-clients").textContent = count(attached);
  $("total-regions").textContent = count(regions);
  $("total-changes").textContent = count(total);
  $("total-rate").textContent = count(recent < 10 ? Math.round(recent * 10) / 10 : Math.round(recent));
  if (rates.length) soon();
}

// --- what the server says

function setState(state, text) {
  root.dataset.state = state;
  if ($("state").textContent !== text) $("state").textContent = text;
}

function touched(client) {
  client.stale = true;
  mark(client);
  soon();
}

const handlers = {
  snapshot(message) {
    skew = message.time - Date.now() / 1000;
    for (const client of clients.values()) dropCard(client);
    clients.clear();
    latest.length = 0;
    total = 0;
    const all = [];
    for (const entry of message.clients) {
      const client = new Client(entry);
      clients.set(client.id, client);
      total += client.count;
      all.push(...client.changes.slice(-LISTED));
    }
    latest.push(...all.sort((a, b) => a.time - b.time).slice(-LISTED));
    setState("live", frozen === null ? "live" : "paused");
    arrange();
    showLatest();
    showTotals();
  },
  attached(message) {
    clients.set(message.client.id, new Client(message.client));
    arrange();
    soon();
  },
  regions(message) {
    const client = clients.get(message.client);
    if (!client) return;
    for (const cookie of message.ended) client.drop(cookie, message.time);
    for (const region of message.added) client.add(region);
    client.layout = null;
    touched(client);
    if (words.length) arrange();
  },
  changes(message) {
    const client = clients.get(message.client);
    if (!client) return;
    client.generation = message.generation;
    client.count += message.changes.length;
    total += message.changes.length;
    const changes = message.changes.map((row) => client.changed(message.time, row));
    if (changes.length) {
      rates.push([performance.now() / 1000, changes.length]);
      noteLatest(changes);
    }
    touched(client);
  },
  ended(message) {
    const client = clients.get(message.client);
    if (!client) return;
    client.ended = message.time;
    client.reason = message.reason;
    for (const region of client.regions) region.ended ??= message.time;
    client.live = 0;
    touched(client);
    arrange();
  },
  forgotten(message) {
    const client = clients.get(message.client);
    if (!client) return;
    dropCard(client);
    clients.delete(message.client);
    arrange();
    soon();
  },
  lost(message) {
    setState("lost", `too slow here: ${plural(message.messages, "message")} skipped`);
  },
};

function connect() {
  const source = new EventSource("events");
  for (const [name, handler] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => handler(JSON.parse(event.data)));
  }
  source.addEventListener("error", () => {
    setState("lost", "connection lost, reconnecting …");
    // It tries again by itself, unless the server answered with an error.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  });
}

// --- controls

$("controls").addEventListener("submit", (event) => event.preventDefault());
$("controls").addEventListener("change", ({ target }) => {
  if (target.name !== "window") return;
  span = target.value === "all" ? Infinity : Number(target.value);
  for (const client of visible) mark(client);
});
$("filter").addEventListener("input", ({ target }) => {
  words = target.value.toLowerCase().split(/\s+/).filter(Boolean);
  arrange();
  showLatest();
});
$("pause").addEventListener("click", ({ target }) => {
  const pausing = frozen === null;
  frozen = pausing ? now() : null;
  target.setAttribute("aria-pressed", String(pausing));
  target.textContent = pausing ? "Resume" : "Pause";
  if (root.dataset.state === "live") setState("live", pausing ? "paused" : "live");
  if (!pausing) showLatest();
  for (const client of visible) mark(client);
});
dark.addEventListener("change", readTheme);

readTheme();
connect();
