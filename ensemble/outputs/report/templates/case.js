"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const { MASK, tile, outline } = slices;
  const MEMBERS = ["#ffd60a", "#32d1ff", "#6fe36f", "#ff8ad8", "#c69cff", "#ffa552", "#9be7d8", "#e0e0e0"];
  const view = { slice: data.start, zoom: 1, x: 0.5, y: 0.5 }; // x, y: the middle of the view, as fractions of the slice
  const panels = [];
  let labels = null; // context with the sheet of masks

  const voters = data.voters.length;
  const memberColour = (number) => MEMBERS[number % MEMBERS.length];
  // few votes yellow, all votes green
  const voteColour = (votes) => (votes === voters ? "#3ddc84" : `hsl(${15 + 40 * (votes - 1) / Math.max(1, voters - 1)} 100% 55%)`);

  /** One number a voxel: bit 0 the mask, bit k the k-th voter. */
  function bitsOf(slice) {
    const at = tile(data, slice);
    const pixels = labels.getImageData(at.x, at.y, data.width, data.height).data;
    const bits = new Uint32Array(data.width * data.height);
    for (let i = 0; i < bits.length; i++) bits[i] = pixels[4 * i] | (pixels[4 * i + 1] << 8) | (pixels[4 * i + 2] << 16);
    return bits;
  }

  function countVotes(value) {
    let votes = 0;
    for (let k = 1; k <= voters; k++) votes += (value >>> k) & 1;
    return votes;
  }

  /** Size of a slice in mm: pixels need not be square. */
  const size = { x: data.width * data.pixel_mm[0], y: data.height * data.pixel_mm[1] };

  function fit(canvas) {
    const width = Math.max(1, Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)));
    const height = Math.max(1, Math.round(width * size.y / size.x));
    if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  }

  function draw() {
    const mode = element("mode").value, bits = bitsOf(view.slice), at = tile(data, view.slice);
    const edgesOf = (bit) => outline(data, (voxel) => (bits[voxel] >>> bit) & 1);
    const edges = { mask: edgesOf(0) };
    if (mode === "members") for (let k = 1; k <= voters; k++) edges[k] = edgesOf(k);
    for (const panel of panels) {
      const { canvas, context } = panel;
      fit(canvas);
      const sx = canvas.width / data.width * view.zoom, sy = canvas.height / data.height * view.zoom;
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.fillStyle = "#000";
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.setTransform(sx, 0, 0, sy, canvas.width / 2 - view.x * data.width * sx, canvas.height / 2 - view.y * data.height * sy);
      context.save();
      context.beginPath();
      context.rect(0, 0, data.width, data.height);
      context.clip();
      context.imageSmoothingEnabled = element("smooth").checked;
      context.filter = `brightness(${element("brightness").value})`;
      context.drawImage(panel.sheet, at.x, at.y, data.width, data.height, 0, 0, data.width, data.height);
      context.restore();
      if (mode === "agreement") fillVotes(context, bits);
      context.lineWidth = 1.5 * (window.devicePixelRatio || 1) / Math.min(sx, sy);
      if (mode === "members") for (let k = 1; k <= voters; k++) { context.strokeStyle = memberColour(k - 1); context.stroke(edges[k]); }
      if (mode === "mask" || mode === "agreement") { context.strokeStyle = MASK; context.stroke(edges.mask); }
      letters(context, canvas);
    }
    element("where").textContent = `${view.slice + 1} of ${data.slices}`;
    element("slice").value = view.slice + 1;
    element("zoom").textContent = `${view.zoom.toFixed(1)}x`;
    for (const row of document.querySelectorAll("tr.jump")) row.classList.toggle("here", Number(row.dataset.slice) === view.slice + 1);
    slices.strip(element("strip"), data, view.slice);
  }

  function fillVotes(context, bits) {
    context.globalAlpha = 0.45;
    for (let i = 0; i < bits.length; i++) {
      const votes = countVotes(bits[i]);
      if (!votes) continue;
      context.fillStyle = voteColour(votes);
      context.fillRect(i % data.width, Math.floor(i / data.width), 1, 1);
    }
    context.globalAlpha = 1;
  }

  function letters(context, canvas) {
    const scale = window.devicePixelRatio || 1, edge = 11 * scale;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#fff";
    context.font = `${13 * scale}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const middle = [canvas.width / 2, canvas.height / 2];
    context.strokeStyle = "#000";
    context.lineWidth = 3 * scale;
    const places = [["R", edge, middle[1]], ["L", canvas.width - edge, middle[1]], ["A", middle[0], edge], ["P", middle[0], canvas.height - edge]];
    for (const place of places) { context.strokeText(...place); context.fillText(...place); }
  }

  function go(slice) {
    view.slice = Math.min(data.slices - 1, Math.max(0, slice));
    draw();
  }

  function zoom(factor) {
    view.zoom = Math.min(16, Math.max(1, view.zoom * factor));
    settle();
  }

  /** Keep the view inside the slice. */
  function settle() {
    const half = 0.5 / view.zoom;
    view.x = Math.min(1 - half, Math.max(half, view.x));
    view.y = Math.min(1 - half, Math.max(half, view.y));
    draw();
  }

  function legend() {
    const place = element("legend"), mode = element("mode").value, entries = [];
    if (mode === "mask" || mode === "agreement") entries.push([MASK, "mask (outline)"]);
    if (mode === "agreement") {
      for (let votes = 1; votes <= voters; votes++) entries.push([voteColour(votes), votes === voters ? "all vote lesion" : `${votes} of ${voters}`]);
    }
    if (mode === "members") data.voters.forEach((name, k) => entries.push([memberColour(k), name]));
    place.replaceChildren(...entries.map(([colour, text]) => {
      const entry = document.createElement("span"), swatch = document.createElement("i");
      swatch.className = "swatch";
      swatch.style.background = colour;
      entry.append(swatch, text);
      return entry;
    }));
  }

  function voxelAt(canvas, event) {
    const box = canvas.getBoundingClientRect();
    return {
      x: Math.floor((view.x + ((event.clientX - box.left) / box.width - 0.5) / view.zoom) * data.width),
      y: Math.floor((view.y + ((event.clientY - box.top) / box.height - 0.5) / view.zoom) * data.height),
    };
  }

  function readout(canvas, event) {
    const { x, y } = voxelAt(canvas, event);
    if (x < 0 || y < 0 || x >= data.width || y >= data.height) { element("readout").textContent = ""; return; }
    const at = tile(data, view.slice), pixel = labels.getImageData(at.x + x, at.y + y, 1, 1).data;
    const value = pixel[0] | (pixel[1] << 8) | (pixel[2] << 16);
    const names = data.voters.filter((_, k) => (value >>> (k + 1)) & 1);
    element("readout").textContent = names.length ? `under the pointer: lesion by ${names.join(", ")}${value & 1 ? "; in the mask" : "; not in the mask"}` : "";
  }

  function interact(canvas) {
    let from = null;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (event.ctrlKey) zoom(event.deltaY < 0 ? 1.25 : 0.8);
      else go(view.slice + (event.deltaY < 0 ? 1 : -1));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => { from = event; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", (event) => {
      readout(canvas, event);
      if (!from) return;
      view.x -= (event.clientX - from.clientX) / canvas.clientWidth / view.zoom;
      view.y -= (event.clientY - from.clientY) / canvas.clientHeight / view.zoom;
      from = event;
      settle();
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { from = null; });
  }

  function listen() {
    const slider = element("slice");
    slider.max = data.slices;
    slider.addEventListener("input", () => go(Number(slider.value) - 1));
    element("mode").addEventListener("change", () => { legend(); draw(); });
    for (const id of ["brightness", "smooth"]) element(id).addEventListener("input", draw);
    element("in").addEventListener("click", () => zoom(1.5));
    element("out").addEventListener("click", () => zoom(1 / 1.5));
    element("whole").addEventListener("click", () => { view.x = view.y = 0.5; view.zoom = 1; draw(); });
    element("strip").addEventListener("click", (event) => go(Math.floor(event.offsetX / element("strip").clientWidth * data.slices)));
    document.addEventListener("keydown", (event) => {
      if (/^(INPUT|SELECT)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
      const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5 };
      if (event.key in steps) { event.preventDefault(); go(view.slice + steps[event.key]); }
      if (event.key === "+" || event.key === "=") zoom(1.5);
      if (event.key === "-") zoom(1 / 1.5);
    });
    for (const row of document.querySelectorAll("tr.jump")) {
      row.addEventListener("click", () => go(Number(row.dataset.slice) - 1));
      row.addEventListener("keydown", (event) => { if (event.key === "Enter") go(Number(row.dataset.slice) - 1); });
    }
    window.addEventListener("resize", draw);
  }

  Promise.all([slices.load(data.labels), ...data.images.map((image) => slices.load(image.sheet))]).then(([sheet, ...sheets]) => {
    labels = slices.readable(sheet);
    sheets.forEach((image, k) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption"), panel = document.createElement("canvas");
      caption.textContent = data.images[k].name;
      panel.setAttribute("aria-label", `${data.images[k].name} slice with the outline of the mask`);
      figure.append(caption, panel);
      element("panels").append(figure);
      panels.push({ canvas: panel, context: panel.getContext("2d"), sheet: image });
      interact(panel);
    });
    element("viewer").hidden = false;
    listen();
    legend();
    draw();
    document.body.dataset.ready = "yes";
  });
})();
