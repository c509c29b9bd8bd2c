"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const { MASK, load, tile, outline } = slices;
  const STORE = `reader-study-${data.study}`;
  const rows = [...document.querySelectorAll(".question")];
  const questions = rows.map((row) => row.dataset.question);
  const canvases = [...document.querySelectorAll("#panels canvas")];
  const view = { item: 0, slice: 0, image: 0, marked: 0 };
  let answers = {}, loaded = null, turn = 0;

  function trouble(text) {
    element("trouble").textContent = text;
    element("trouble").hidden = false;
  }

  function restore() {
    try {
      const kept = JSON.parse(localStorage.getItem(STORE) || "{}");
      answers = kept.answers || {};
      element("reader").value = kept.reader || "";
    } catch (error) {
      trouble("This browser keeps no answers of pages on disk: save them before you close the page.");
    }
  }

  function keep() {
    try {
      localStorage.setItem(STORE, JSON.stringify({ reader: element("reader").value, answers }));
    } catch (error) {
      trouble("This browser keeps no answers of pages on disk: save them before you close the page.");
    }
  }

  const current = () => data.items[view.item];
  const answered = (item) => questions.every((question) => (answers[item.item] || {})[question]);

  /** Show a case, once its pictures are decoded; a later call overtakes. */
  async function show(number) {
    const mine = ++turn;
    view.item = Math.min(data.items.length - 1, Math.max(0, number));
    const item = current();
    document.body.dataset.shown = "";
    const [labels, ...images] = await Promise.all([load(item.labels), ...item.images.map((image) => load(image.sheet))]);
    if (mine !== turn) return;
    loaded = { labels: slices.readable(labels), images };
    view.slice = item.start;
    view.image = Math.min(view.image, images.length - 1);
    view.marked = Math.max(0, questions.findIndex((question) => !(answers[item.item] || {})[question]));
    element("image").replaceChildren(...item.images.map((image, k) => new Option(image.name, k)));
    element("slice").max = item.slices;
    element("number").textContent = view.item + 1;
    draw();
    tell();
    document.body.dataset.shown = String(view.item + 1);
    document.body.dataset.ready = "yes";
  }

  function draw() {
    if (!loaded) return;
    const item = current(), at = tile(item, view.slice);
    const pixels = loaded.labels.getImageData(at.x, at.y, item.width, item.height).data;
    canvases.forEach((canvas, side) => {
      const context = canvas.getContext("2d");
      canvas.width = Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
      canvas.height = Math.max(1, Math.round(canvas.width * (item.height * item.pixel_mm[1]) / (item.width * item.pixel_mm[0])));
      const sx = canvas.width / item.width, sy = canvas.height / item.height;
      context.setTransform(sx, 0, 0, sy, 0, 0);
      context.imageSmoothingEnabled = false;
      context.filter = `brightness(${element("brightness").value})`;
      context.drawImage(loaded.images[view.image], at.x, at.y, item.width, item.height, 0, 0, item.width, item.height);
      context.filter = "none";
      if (!element("outlines").checked) return;
      context.lineWidth = 1.5 * (window.devicePixelRatio || 1) / Math.min(sx, sy);
      context.strokeStyle = MASK;
      context.stroke(outline(item, (voxel) => pixels[4 * voxel + side] > 127)); // 0 left, 1 right
    });
    element("where").textContent = `${view.slice + 1} of ${item.slices}`;
    element("slice").value = view.slice + 1;
    element("image").value = String(view.image);
    slices.strip(element("strip"), item, view.slice);
  }

  /** Show the answers of the case, and which question a digit answers. */
  function tell() {
    const given = answers[current().item] || {};
    rows.forEach((row, k) => {
      row.classList.toggle("marked", k === view.marked);
      for (const button of row.querySelectorAll("button")) button.setAttribute("aria-checked", String(given[questions[k]] === button.dataset.value));
    });
    element("done").textContent = `${data.items.filter(answered).length} of ${data.items.length}`;
  }

  function answer(question, value) {
    answers[current().item] = { ...answers[current().item], [questions[question]]: value };
    view.marked = Math.min(questions.length - 1, question + 1);
    keep();
    tell();
  }

  function go(slice) {
    view.slice = Math.min(current().slices - 1, Math.max(0, slice));
    draw();
  }

  function nextOpen() {
    const n = data.items.length;
    for (let step = 1; step <= n; step++) {
      const number = (view.item + step) % n;
      if (!answered(data.items[number])) return show(number);
    }
    return undefined;
  }

  function cell(text) {
    const safe = /^\s*[=+\-@\uff1d\uff0b\uff0d\uff20]/.test(text) ? `'${text}` : text;
    return `"${safe.replace(/"/g, '""')}"`;
  }

  function save() {
    const reader = element("reader").value.trim();
    if (!reader) {
      trouble("Enter your name or number first.");
      element("reader").focus();
      return;
    }
    element("trouble").hidden = true;
    const lines = [["study", "reader", "item", ...questions].join(",")];
    for (const item of data.items) {
      const given = answers[item.item] || {};
      lines.push([data.study, reader, item.item, ...questions.map((question) => given[question] || "")].map(cell).join(","));
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\r\n"), "\r\n"], { type: "text/csv" }));
    link.download = `answers_${reader.replace(/[^A-Za-z0-9]+/g, "-")}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function clear() {
    if (!window.confirm("Forget the name and all answers in this browser? Save them first.")) return;
    answers = {};
    element("reader").value = "";
    keep();
    show(0);
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.id === "reader") return;
    const steps = { ArrowUp: 1, ArrowDown: -1, PageUp: 5, PageDown: -5 };
    if (event.key in steps) { event.preventDefault(); go(view.slice + steps[event.key]); return; }
    const letter = event.key.toLowerCase();
    const sides = { l: "left", e: "equal", r: "right" };
    const acts = {
      m: () => { view.image = (view.image + 1) % current().images.length; draw(); },
      h: () => { element("outlines").checked = !element("outlines").checked; draw(); },
      q: () => { view.marked = (view.marked + 1) % questions.length; tell(); },
      n: () => show(view.item + 1),
      p: () => show(view.item - 1),
      u: nextOpen,
      s: save,
    };
    if (letter in sides) answer(0, sides[letter]);
    else if (/^[1-5]$/.test(letter)) answer(Math.max(1, view.marked), letter);
    else if (letter in acts) acts[letter]();
    else return;
    event.preventDefault();
  }

  element("slice").addEventListener("input", () => go(Number(element("slice").value) - 1));
  element("image").addEventListener("change", () => { view.image = Number(element("image").value); draw(); });
  for (const id of ["brightness", "outlines"]) element(id).addEventListener("input", draw);
  element("reader").addEventListener("input", keep);
  element("save").addEventListener("click", save);
  element("clear").addEventListener("click", clear);
  element("next").addEventListener("click", () => show(view.item + 1));
  element("back").addEventListener("click", () => show(view.item - 1));
  element("open").addEventListener("click", nextOpen);
  rows.forEach((row, k) => {
    for (const button of row.querySelectorAll("button")) button.addEventListener("click", () => answer(k, button.dataset.value));
  });
  for (const canvas of canvases) {
    canvas.addEventListener("wheel", (event) => { event.preventDefault(); go(view.slice + (event.deltaY < 0 ? 1 : -1)); }, { passive: false });
  }
  document.addEventListener("keydown", key);
  window.addEventListener("resize", draw);
  restore();
  const first = data.items.findIndex((item) => !answered(item));
  show(first < 0 ? 0 : first);
})();
