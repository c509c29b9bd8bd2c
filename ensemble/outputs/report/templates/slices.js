"use strict";
/** What pages that show slices share: sheets of slices, outlines of masks, and the strip that says where along the slices a mask lies. */
const slices = (function () {
  const MASK = "#ff453a";

  function load(source) {
    return new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = () => reject(new Error("a sheet of slices can't be decoded"));
      image.src = source;
    });
  }

  /** A canvas' context that holds a picture, to read its pixels from. */
  function readable(image) {
    const canvas = document.createElement("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return context;
  }

  /** Where a slice lies in a sheet of `columns` slices of `width` x `height`. */
  function tile({ columns, width, height }, slice) {
    return { x: (slice % columns) * width, y: Math.floor(slice / columns) * height };
  }

  /** Edges between the voxels of a mask and their neighbours; `holds` says of a voxel's index in the slice whether the mask holds it. */
  function outline({ width, height }, holds) {
    const path = new Path2D();
    const has = (x, y) => x >= 0 && y >= 0 && x < width && y < height && holds(y * width + x);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        if (!has(x, y)) continue;
        if (!has(x - 1, y)) { path.moveTo(x, y); path.lineTo(x, y + 1); }
        if (!has(x + 1, y)) { path.moveTo(x + 1, y); path.lineTo(x + 1, y + 1); }
        if (!has(x, y - 1)) { path.moveTo(x, y); path.lineTo(x + 1, y); }
        if (!has(x, y + 1)) { path.moveTo(x, y + 1); path.lineTo(x + 1, y + 1); }
      }
    }
    return path;
  }

  /** Draw where along the slices a mask lies (its `area` in each), and where we are. */
  function strip(canvas, { area, slices: count }, slice) {
    const context = canvas.getContext("2d");
    canvas.width = Math.max(1, canvas.clientWidth);
    const most = Math.max(1, ...area), step = canvas.width / count;
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.fillStyle = MASK;
    area.forEach((voxels, z) => {
      const height = voxels ? Math.max(2, voxels / most * canvas.height) : 0;
      context.fillRect(z * step, canvas.height - height, Math.max(1, step - 0.5), height);
    });
    context.fillStyle = "#fff";
    context.fillRect((slice + 0.5) * step - 1, 0, 2, canvas.height);
  }

  return { MASK, load, readable, tile, outline, strip };
})();
