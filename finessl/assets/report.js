"use strict";
(() => {
  const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent);
  const { classes, images, thumbs, review } = data, PAGE = 48, parts = ["labelled", "pool", "test"];
  const n = images.pred.length, known = classes.length, labels = images.label.slice(), doubtful = new Set(data.doubtful);
  const make = (tag, text, name) => {
    const e = document.createElement(tag);
    if (text !== undefined) e.textContent = text;
    if (name) e.className = name;
    return e;
  };
  const source = new Map();
  for (const img of document.querySelectorAll(".card[data-i] img")) source.set(+img.closest(".card").dataset.i, img.src);
  const src = i => source.get(i) || (thumbs[i] ? "data:image/" + data.format + ";base64," + thumbs[i] : "");
  const changed = new Map(), cards = new Map();
  const nameOf = k => k < 0 ? "no label" : classes[k];

  // ---- cards
  function card(i) {
    const f = make("figure", undefined, "card"), caption = make("figcaption"), where = src(i);
    f.dataset.i = i;
    if (where) { const img = make("img"); img.alt = images.name[i]; img.loading = "lazy"; img.src = where; f.append(img); }
    else f.append(make("div", undefined, "none"));
    caption.append(make("b", nameOf(images.pred[i]) + " " + Math.round(100 * images.conf[i]) + "%"));
    if (labels[i] >= 0 && labels[i] !== images.pred[i]) caption.append(make("span", "labelled " + nameOf(labels[i]), "said"));
    const name = images.name[i], file = make("span", name.length > 18 ? "…" + name.slice(-17) : name, "file");
    file.title = images.name[i] + " (" + parts[images.kind[i]] + ")";
    caption.append(file);
    f.append(caption);
    return f;
  }
  function adopt(f) { // a card of the page, or one made here: what is missing, and controls
    const i = +f.dataset.i;
    if (!f.querySelector("img") && src(i)) {
      const img = make("img");
      img.alt = images.name[i]; img.loading = "lazy"; img.src = src(i);
      f.querySelector(".none").replaceWith(img);
    }
    if (!review) return f;
    if (f.querySelector("img")) f.querySelector("img").src = "image/" + i;
    const select = make("select");
    select.setAttribute("aria-label", "label of " + images.name[i]);
    select.append(new Option("no label", -1), ...classes.map((c, k) => new Option(c, k)), new Option("another class …", "new"));
    select.value = labels[i];
    select.addEventListener("change", () => {
      if (select.value !== "new") return send("label", { image: i, label: +select.value });
      select.value = labels[i];
      const name = prompt("Which class is " + images.name[i] + "?");
      if (name && name.trim()) send("label", { image: i, label: name });
    });
    const accept = make("button", "✓ " + nameOf(images.pred[i]));
    accept.type = "button";
    accept.setAttribute("aria-label", "label " + images.name[i] + " as " + nameOf(images.pred[i]));
    accept.addEventListener("click", () => send("label", { image: i, label: images.pred[i] }));
    f.append(select, accept);
    if (!cards.has(i)) cards.set(i, new Set());
    cards.get(i).add(f);
    show(f, i);
    return f;
  }
  function show(f, i) {
    const select = f.querySelector("select"), last = select.options.length - 1;
    for (let k = last - 1; k < classes.length; k++) select.add(new Option(classes[k], k), k + 1);
    select.value = labels[i];
    f.querySelector("button").disabled = labels[i] === images.pred[i];
    f.classList.toggle("changed", changed.has(i));
  }

  // ---- filter
  const form = $("filter"), list = $("found"), more = $("more");
  let found = [], shown = 0, asked;
  const tests = { all: () => true, wrong: i => labels[i] >= 0 && labels[i] !== images.pred[i], doubtful: i => doubtful.has(i),
    unlabelled: i => labels[i] < 0, changed: i => changed.has(i) };
  function filter() {
    const v = Object.fromEntries(new FormData(form)), key = JSON.stringify(v);
    if (key === asked) return; // leaving a field is no change: a card that is clicked stays where it is
    asked = key;
    const low = v.low / 100, high = v.high / 100, text = v.text.toLowerCase();
    found = [];
    for (let i = 0; i < n; i++)
      if ((v.class === "" || images.pred[i] === +v.class) && (v.part === "" || images.kind[i] === +v.part)
          && images.conf[i] >= low && images.conf[i] <= high && tests[v.which](i)
          && (!text || images.name[i].toLowerCase().includes(text))) found.push(i);
    found.sort((a, b) => (v.order === "least" ? 1 : -1) * (images.conf[a] - images.conf[b]) || a - b);
    for (const f of list.children) cards.get(+f.dataset.i)?.delete(f);
    list.replaceChildren();
    shown = 0;
    next();
  }
  function next() {
    list.append(...found.slice(shown, shown + PAGE).map(i => adopt(card(i))));
    shown = Math.min(found.length, shown + PAGE);
    $("count").textContent = found.length + (found.length === 1 ? " image" : " images") + ", " + shown + " shown";
    more.hidden = shown >= found.length;
  }
  classes.forEach((c, k) => form.elements.class.append(new Option(c, k)));
  for (const event of ["input", "change"]) form.addEventListener(event, filter);
  form.addEventListener("submit", e => e.preventDefault());
  more.addEventListener("click", () => {
    const first = shown;
    next();
    const f = list.children[first], target = f && (f.querySelector("select") || f);
    if (target) { if (target === f) f.tabIndex = -1; target.focus(); }
  });
  for (const e of form.querySelectorAll("option.review")) if (!review) e.remove();
  $("browse").hidden = false;

  // ---- review: the server holds the truth, the page shows it
  function take(state) {
    const named = state.new.slice(classes.length - known); // classes that the run does not know
    classes.push(...named);
    if (named.length) for (const [i, all] of cards) for (const f of all) show(f, i);
    const touched = new Set([...changed.keys(), ...Object.keys(state.labels).map(Number)]);
    changed.clear();
    for (const [i, k] of Object.entries(state.labels)) changed.set(+i, k);
    for (const i of touched) {
      labels[i] = changed.has(i) ? changed.get(i) : images.label[i];
      for (const f of cards.get(i) || []) show(f, i);
    }
    $("undo").disabled = !state.undo;
    $("status").className = "";
    $("status").textContent = changed.size + (changed.size === 1 ? " label" : " labels") + " changed, kept in " + state.file;
  }
  async function send(what, body) {
    try {
      const answer = await fetch(what, body === undefined ? {} : { method: "POST", body: JSON.stringify(body),
        headers: { "Content-Type": "application/json" } });
      const state = await answer.json();
      if (!answer.ok) throw new Error(state.error);
      take(state);
    } catch (e) {
      $("status").className = "failed";
      $("status").textContent = "Not kept: " + (e instanceof TypeError ? "finessl review has stopped; start it again and reload" : e.message);
      for (const [i, all] of cards) for (const f of all) show(f, i);
    }
  }
  for (const f of document.querySelectorAll("main .card[data-i]")) adopt(f);
  if (review) {
    $("undo").addEventListener("click", () => send("undo", {}));
    document.addEventListener("keydown", e => {
      if ((e.ctrlKey || e.metaKey) && !e.shiftKey && e.key === "z" && !e.target.matches("input")) { e.preventDefault(); send("undo", {}); }
    });
    send("state").then(filter);
  } else filter();
})();
