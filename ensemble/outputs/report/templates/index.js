"use strict";
(function () {
  const table = document.getElementById("cases"), body = table.tBodies[0], find = document.getElementById("find");
  const buttons = [...table.tHead.querySelectorAll("button")];
  const pager = document.getElementById("pager"), place = document.getElementById("place");
  const [back, on] = pager.querySelectorAll("button");
  const more = document.getElementById("more").content;
  const PAGE = Number(table.dataset.page); // rows in the document at a time: tens of thousands would make every click wait
  const naturally = new Intl.Collator("en", { numeric: true }).compare;
  const all = [...body.rows, ...more.querySelectorAll("tr")].map((row) => {
    const cells = [...row.cells].map((cell) => cell.textContent.trim());
    return { row, cells, words: cells.join("\n").toLowerCase() };
  });
  let found = all, first = 0;

  function show() {
    body.replaceChildren(...found.slice(first, first + PAGE).map((entry) => entry.row));
    pager.hidden = found.length <= PAGE;
    place.textContent = `${first + 1} to ${Math.min(first + PAGE, found.length)} of ${found.length}`;
    back.disabled = first === 0;
    on.disabled = first + PAGE >= found.length;
  }

  function filter() {
    const wanted = find.value.toLowerCase();
    found = all.filter((entry) => entry.words.includes(wanted));
    document.getElementById("shown").textContent = wanted ? `${found.length} of ${all.length}` : "";
    first = 0;
    show();
  }

  buttons.forEach((button, column) => button.addEventListener("click", () => {
    const heading = button.parentElement, down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of buttons) other.parentElement.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const number = heading.classList.contains("number");
    all.sort((a, b) => {
      const [left, right] = [a.cells[column], b.cells[column]];
      if (!left || !right) return (left ? 0 : 1) - (right ? 0 : 1); // what has no value goes last, either way
      return (number ? left - right : naturally(left, right)) * (down ? -1 : 1);
    });
    filter();
  }));
  back.addEventListener("click", () => { first -= PAGE; show(); });
  on.addEventListener("click", () => { first += PAGE; show(); });
  find.addEventListener("input", filter);
  window.addEventListener("beforeprint", () => body.replaceChildren(...found.map((entry) => entry.row)));
  window.addEventListener("afterprint", show);
  show();
  document.body.dataset.ready = "yes";
})();
